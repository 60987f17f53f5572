"""Several members write one text character by character: CharED's loop, without the models.

Each round all members are asked for a next-token distribution after the common text, each in its own tokens. Symbols
are drawn from their average until the piece ends; then the piece is appended and all are asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.spelling.mass import Mass
from engine.spelling.speller import Speller
from engine.spelling.strand import Strand
from engine.spelling.symbols import (
    END,
    EXACT,
    Average,
    Sparse,
    average,
    average_sparse,
    choose,
    choose_sparse,
    inside_character,
    without,
    without_sparse,
)

_BYTES = [bytes([symbol]) for symbol in range(256)]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one round wrote.

    Attributes:
        text: its bytes; empty if the text ended instead.
        ended: whether the text ended.
        support: per member the log-probability that it gives to this piece, or to the end; None if it had no token left
            that begins like the piece.
        source: the member with the greatest weighted probability of it, the first of equal ones.
    """

    text: bytes
    ended: bool
    support: tuple[float | None, ...]
    source: int


class Chorus:
    """One text that several members write, character by character.

    Temperature 0 is the most probable *symbol* each time, which is not the most probable token: four tokens that begin
    with the same letter outweigh a single more probable one.

    With several members a piece does not end within a UTF-8 character while any of them can go on.

    Args:
        spellers: per member.
        weights: per member, positive.
        kind: how the members' distributions are averaged.
        temperature: of the symbols.
        draw: a number in [0, 1) for the symbol with this index in the text (bytes and pieces before it). A pure
            function, so that the text depends on nothing else.
        min_pieces: the text does not end before.
        ignore_end: the text does not end at all, unless no member can go on.

    Attributes:
        strands: per member, its tokens for the text.
        pieces: how many were written.
    """

    def __init__(
        self,
        spellers: Sequence[Speller],
        weights: Sequence[float],
        *,
        kind: Average = "mixture",
        temperature: float = 1.0,
        draw: Callable[[int], float],
        min_pieces: int = 0,
        ignore_end: bool = False,
    ) -> None:
        assert len(spellers) == len(weights)
        assert min(weights) > 0, "a member without weight is not asked"
        self.strands = [Strand(speller) for speller in spellers]
        self.pieces = 0
        self._weights = list(weights)
        self._children = [speller.vocabulary.children for speller in spellers]
        self._kind: Average = kind
        self._temperature = temperature
        self._draw = draw
        self._min_pieces = min_pieces
        self._ignore_end = ignore_end

    @property
    def text(self) -> bytes:
        """What is written."""
        return bytes(self.strands[0].text)

    def write(self, masses: Sequence[Mass]) -> Piece:
        """Draw the next piece and append it to every member's strand.

        Args:
            masses: per member, at the end of its strand.

        Raises:
            SpellingError: a member cannot spell the piece; the chorus must not be used any more.
        """
        written = len(self.strands[0].text) + self.pieces
        symbol = self._begin(masses, written)
        if symbol == END:
            return Piece(b"", True, *self._support([mass.end for mass in masses]))
        piece = self._go_on(masses, symbol, written)
        support, source = self._support([mass.at(piece) for mass in masses])
        self._append(piece, masses, support)
        return Piece(piece, False, support, source)

    def _begin(self, masses: Sequence[Mass], written: int) -> int:
        """The first symbol of a piece, of all that there are."""
        row = average([mass.first() for mass in masses], self._weights, self._kind)
        if self._ignore_end or self.pieces < self._min_pieces:
            row = without(row, END)
        return choose(row, self._temperature, self._draw(written) if self._temperature else 0.0)

    def _go_on(self, masses: Sequence[Mass], symbol: int, written: int) -> bytes:
        """The piece that begins with a symbol, each further one of the few that can follow."""
        piece = _BYTES[symbol]
        # Members that have a token which begins like this, and find it possible.
        singing = [member for member, mass in enumerate(masses) if mass.begins(symbol)]
        while singing:
            nodes = [self._children[member](piece) for member in singing]
            following = nodes[0].symbols
            if len(following) == 1 and all(node.symbols == following for node in nodes[1:]):
                (symbol,) = following  # whoever sings: nothing has to be weighed
            else:
                rows = [
                    dict(zip(node.symbols, masses[member].following(node), strict=True))
                    for member, node in zip(singing, nodes, strict=True)
                ]
                symbol, singing = self._weigh(singing, rows, piece, written)
            if symbol == EXACT:
                break
            piece += _BYTES[symbol]
        return piece

    def _weigh(self, singing: list[int], rows: list[Sparse], piece: bytes, written: int) -> tuple[int, list[int]]:
        """A symbol, and who of those that sing finds it possible."""
        joint = rows[0]
        if len(rows) > 1:
            totals = [sum(row.values()) for row in rows]
            joint = average_sparse(rows, totals, [self._weights[member] for member in singing], self._kind)
        unfinished = piece[-1] >= 0x80 and inside_character(bytes(self.strands[0].text[-4:]) + piece)
        if unfinished and EXACT in joint and len(self._weights) > 1:
            joint = without_sparse(joint, EXACT)
        uniform = self._draw(written + len(piece)) if self._temperature else 0.0
        symbol = choose_sparse(joint, self._temperature, uniform)
        return symbol, [member for member, row in zip(singing, rows, strict=True) if row.get(symbol)]

    def _support(self, chances: Sequence[float]) -> tuple[tuple[float | None, ...], int]:
        """The members' log-probabilities of what was written, and who finds it the most probable, by weight."""
        weighted = [chance * weight for chance, weight in zip(chances, self._weights, strict=True)]
        return tuple([math.log(chance) if chance > 0 else None for chance in chances]), weighted.index(max(weighted))

    def _append(self, piece: bytes, masses: Sequence[Mass], support: Sequence[float | None]) -> None:
        # Those that find the piece most probable wrote it, and go on from their very token; the others follow.
        loudest = max((heard for heard in support if heard is not None), default=-math.inf)
        for strand, mass, heard in zip(self.strands, masses, support, strict=True):
            own = mass.likeliest(piece) if heard is not None and heard >= loudest - 1e-9 else None
            strand.follow(piece, [] if own is None else [own])
        self.pieces += 1

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
    symbols,
    without,
    without_sparse,
)


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
        before = bytes(self.strands[0].text[-4:])
        symbol, support = self._begin(masses, self._draw(written))
        piece = b""
        while symbol < EXACT:
            piece += bytes([symbol])
            symbol = self._go_on(masses, support, before, piece, self._draw(written + len(piece)))
        best = max(
            range(len(masses)),
            key=lambda m: -math.inf if (heard := support[m]) is None else heard + math.log(self._weights[m]),
        )
        if symbol == END:
            return Piece(b"", True, tuple(support), best)
        self._append(piece, masses, support)
        return Piece(piece, False, tuple(support), best)

    def _begin(self, masses: Sequence[Mass], uniform: float) -> tuple[int, list[float | None]]:
        """The first symbol of a piece, of all that there are, and each member's log-probability of it."""
        rows = [symbols(mass, b"") for mass in masses]
        singing = [member for member, row in enumerate(rows) if row is not None]
        row = average([row for row in rows if row is not None], [self._weights[m] for m in singing], self._kind)
        if self._ignore_end or self.pieces < self._min_pieces:
            row = without(row, END)
        symbol = choose(row, self._temperature, uniform)
        chances = [0.0 if own is None else float(own[symbol]) for own in rows]
        return symbol, [math.log(chance) if chance else None for chance in chances]

    def _go_on(
        self, masses: Sequence[Mass], support: list[float | None], before: bytes, piece: bytes, uniform: float
    ) -> int:
        """The symbol after the beginning of a piece, of the few that can follow; updates ``support``."""
        rows: list[Sparse] = []
        totals: list[float] = []
        weights: list[float] = []
        singing: list[int] = []
        for member, heard in enumerate(support):
            if heard is not None and (total := sum((row := masses[member].following(piece)).values())) > 0:
                rows.append(row)
                totals.append(total)
                weights.append(self._weights[member])
                singing.append(member)
            else:
                support[member] = None
        joint = average_sparse(rows, totals, weights, self._kind)
        if len(masses) > 1 and EXACT in joint and inside_character(before + piece):
            joint = without_sparse(joint, EXACT)
        symbol = choose_sparse(joint, self._temperature, uniform)
        for member, row, total in zip(singing, rows, totals, strict=True):
            heard, chance = support[member], row.get(symbol, 0.0)
            support[member] = None if heard is None or chance == 0.0 else heard + math.log(chance / total)
        return symbol

    def _append(self, piece: bytes, masses: Sequence[Mass], support: Sequence[float | None]) -> None:
        # Those that find the piece most probable wrote it, and go on from their very token; the others follow.
        loudest = max((heard for heard in support if heard is not None), default=-math.inf)
        for strand, mass, heard in zip(self.strands, masses, support, strict=True):
            own = mass.likeliest(piece) if heard is not None and heard >= loudest - 1e-9 else None
            strand.follow(piece, [] if own is None else [own])
        self.pieces += 1

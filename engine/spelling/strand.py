"""One member's side of the common text: its own tokens for it, and what its lane has to be told."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from engine.spelling.speller import Speller

REACH = 256
"""Bytes back within which a safe boundary is looked for. Without one there the text is spelled anew from a token's end
some way back, so that a text without any boundary costs no more with its length.
"""

_AGREE = 8
"""Tokens in a row that must come out as they stand before a restart at no safe boundary is believed."""


_NEAR = 12
"""Tokens whose ends are tried one by one before a search for a safe boundary."""


class Change(NamedTuple):
    """What made a strand follow some text.

    Attributes:
        begin: where the text began.
        kept: how many tokens before it stayed as they were.
        dropped: those after them, which were spelled anew.
        told: what of the tokens its lane held then.
        tellings: how often the lane had been told.
    """

    begin: int
    kept: int
    dropped: tuple[int, ...]
    told: int
    tellings: int


class Strand:
    """The tokens of one member for a text that several members write.

    The member's own tokens stay as it wrote them, canonical or not. Text of others is spelled by the member's
    tokenizer, from the last safe boundary on, so that a word of which others wrote a part is spelled as a word. Thus a
    member that writes alone sees exactly what it would see without the others.

    Args:
        speller: of the member's vocabulary.

    Attributes:
        tokens: spell the text, but for ``pending``.
        ends: the offset in the text after each token.
    """

    __slots__ = ("_held", "_tellings", "_told", "ends", "speller", "text", "tokens")

    def __init__(self, speller: Speller) -> None:
        self.speller = speller
        self.text = bytearray()
        self.tokens: list[int] = []
        self.ends: list[int] = []
        self._told = 0  # tokens at the beginning that the lane has been told and that are still true
        self._held = 0  # tokens that the lane has been told, true or not
        self._tellings = 0

    @property
    def end(self) -> int:
        """Offset after the last token."""
        return self.ends[-1] if self.ends else 0

    @property
    def pending(self) -> bytes:
        """Text beyond the last token: the beginning of a character that cannot be spelled before its end is known."""
        return bytes(self.text[self.end :])

    def follow(self, text: bytes, own: Sequence[int] = ()) -> Change:
        """The text grew.

        Args:
            text: what was appended.
            own: the tokens in which this member wrote it, if it did.

        Returns:
            What :meth:`undo` needs.

        Raises:
            SpellingError: the vocabulary cannot spell the text; the strand must not be used any more.
        """
        since, told, count = len(self.text), self._told, len(self.tokens)
        self.text += text
        dropped: tuple[int, ...] = ()
        if own and since == self.end:
            assert self.speller.vocabulary.text_of(own) == text, "a member's tokens are not the text that it wrote"
            self._append(own)
        elif text:
            dropped = self._respell(since)
        return Change(since, count - len(dropped), dropped, told, self._tellings)

    def undo(self, change: Change) -> None:
        """Take the last change back."""
        del self.text[change.begin :], self.tokens[change.kept :], self.ends[change.kept :]
        self._append(change.dropped)
        # Unless the lane has been told since, it still holds what the change was about to replace.
        self._told = change.told if change.tellings == self._tellings else min(self._told, change.kept)

    def aligned(self, upcoming: bytes) -> bool:
        """Whether the member's tokens have a boundary where the text ends, if ``upcoming`` follows.

        A model asked elsewhere has to go on from a beginning of a word that it would never have seen in training: the
        first check of SAFE (arXiv 2510.15346).
        """
        here = len(self.text)
        if here != self.end:
            return False
        offset = max(here - 4 * REACH, 0)
        text = bytes(self.text[offset:]) + upcoming
        boundary = self._boundary(text, here - offset, offset)
        begin = self._restart(here) if boundary is None else boundary + offset
        end = begin
        for token in self.speller.spell_begun(text[begin - offset :])[0] if begin < here else ():
            end += len(self.speller.vocabulary.bytes_of(token) or b"")
            if end >= here:
                break
        return end == here

    def plan(self) -> tuple[int, list[int]]:
        """What the lane has to be told: how many of the tokens it holds it keeps, and those that follow.

        No tokens means that it holds what it should: its last sample is as good as a new one.
        """
        keep = self._told
        if keep == len(self.tokens) < self._held:
            keep -= 1  # a lane is cut only together with growing
        return keep, self.tokens[keep:]

    def tell(self) -> None:
        """The lane has been told what :meth:`plan` says."""
        self._told = self._held = len(self.tokens)
        self._tellings += 1

    @property
    def tellable(self) -> bool:
        """Whether the lane can be brought to hold these tokens: it is never cut to none."""
        return bool(self.tokens) or not self._held

    def cut(self, length: int) -> None:
        """Take the text back beyond an offset at which a token ends."""
        place = self._place(length)
        assert length == (self.ends[place - 1] if place else 0), "no token ends where the text is cut"
        del self.text[length:], self.tokens[place:], self.ends[place:]
        self._told = min(self._told, place)

    def settled(self) -> int:
        """How many tokens at the beginning will never be spelled anew, whatever follows."""
        boundary = self._boundary(self.text, len(self.text), 0)
        certain = len(self.text) - 4 * REACH
        return self._place(max(certain, 0 if boundary is None else boundary))

    def _append(self, tokens: Sequence[int]) -> None:
        end = self.end
        for token in tokens:
            end += len(self.speller.vocabulary.bytes_of(token) or b"")
            self.tokens.append(token)
            self.ends.append(end)

    def _respell(self, since: int) -> tuple[int, ...]:
        """Spell anew from the last safe boundary on; the tokens that are no more."""
        boundary = self._boundary(self.text, since, 0)
        begin = self._resume(since) if boundary is None else boundary
        fresh, _ = self.speller.spell_begun(bytes(self.text[begin:]))
        kept = first = self._place(begin)
        # What comes out as it stands has been told already.
        while kept < len(self.tokens) and kept - first < len(fresh) and self.tokens[kept] == fresh[kept - first]:
            kept += 1
        dropped = tuple(self.tokens[kept:])
        del self.tokens[kept:], self.ends[kept:]
        self._told = min(self._told, kept)
        self._append(fresh[kept - first :])
        return dropped

    def _place(self, offset: int) -> int:
        """How many tokens end at or before an offset."""
        return bisect_right(self.ends, offset)

    def _boundary(self, text: bytes | bytearray, since: int, offset: int) -> int | None:
        """The last safe boundary up to ``since`` at which a token ends, within reach; of ``text``, which begins at
        ``offset`` of the strand's.
        """
        boundaries, ends = self.speller.boundaries, self.ends
        count = self._place(since + offset)
        # Mostly one of the last tokens begins a word; a search further back is for texts without words.
        near = max(count - _NEAR, 0)
        for end in reversed(ends[near:count]):
            if end - offset < max(since - REACH, 1):
                return None
            if boundaries.at(text, end - offset):
                return end - offset
        if not near:
            return None
        for boundary in reversed(list(boundaries.within(text, max(since - REACH, 1), ends[near - 1] - offset))):
            if ends[self._place(boundary + offset) - 1] == boundary + offset:
                return boundary
        return None

    def _restart(self, since: int, back: int = REACH // 2) -> int:
        """An offset some way back at which both a token and a character end."""
        if since > REACH:
            for end in reversed(self.ends[: self._place(since - back)]):
                if self.text[end] & 0xC0 != 0x80:
                    return end
        return 0

    def _resume(self, since: int) -> int:
        """Where to spell anew without a safe boundary in reach: where a restart further back comes out as it stands."""
        if since <= REACH:
            return 0
        for back in (REACH // 2, REACH, 2 * REACH):
            begin = end = self._restart(since, back)
            place, agreed = self._place(begin), 0
            for token in self.speller.spell_begun(bytes(self.text[begin:since]))[0][:-_AGREE]:
                end += len(self.speller.vocabulary.bytes_of(token) or b"")
                while place < len(self.ends) and self.ends[place] < end:
                    place, agreed = place + 1, 0
                same = place < len(self.ends) and self.ends[place] == end and self.tokens[place] == token
                agreed = agreed + 1 if same else 0
                if agreed == _AGREE:
                    return end
        return self._restart(since)

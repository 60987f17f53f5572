"""A member that reads the base's text in tokens of its own, drafts included, and says what could follow."""

from __future__ import annotations

from collections.abc import Iterable

from engine.spelling.mass import Mass
from engine.spelling.speller import Speller, SpellingError
from engine.spelling.strand import Change, Strand


class Reader:
    """See the module's docstring. Whatever is written is spelled by the member's own tokenizer, as published.

    Args:
        speller: of the member's vocabulary.
        prompt_length: tokens of its prompt.
        context: most tokens that its lane holds, prompt included.

    Attributes:
        strand: its tokens for what is written and for the drafts that it has followed.
        masses: what it says after so many of these tokens.
        owed: after how many of them its lane is about to sample.
        final: how many of them can no longer be cut.
        told_final: the same, as its lane has been told.
    """

    __slots__ = ("_changes", "_context", "_lost_at", "final", "masses", "owed", "prompt_length", "strand", "told_final")

    def __init__(self, speller: Speller, prompt_length: int, context: int) -> None:
        self.strand = Strand(speller)
        self.prompt_length = prompt_length
        self.masses: dict[int, Mass] = {}
        self.owed: set[int] = set()
        self.final = 0
        self.told_final = 0
        self._context = context
        self._changes: list[Change] = []
        self._lost_at: int | None = None

    @property
    def place(self) -> int:
        """How many tokens it has: where it is asked."""
        return len(self.strand.tokens)

    def follow(self, text: bytes, asked: Iterable[int]) -> bool:
        """Read on.

        Args:
            text: written or drafted so far; what it has read already, and more.
            asked: places at which the member still has to speak.

        Returns:
            False, and nothing has changed, if the tokens before one of these would be others then.
        """
        begin = len(self.strand.text)
        if self._lost_at is not None or begin == len(text):
            return True
        try:
            change = self.strand.follow(text[begin:])
        except SpellingError:
            # Bytes that are no text, and the vocabulary has no tokens for them: the member cannot read on.
            del self.strand.text[begin:]
            self._lost_at = begin
            return True
        if any(place > change.kept for place in asked):
            self.strand.undo(change)
            return False
        self._forget(change.kept)
        self._changes.append(change)
        return True

    def settle(self, length: int, place: int) -> None:
        """The text is written up to this offset, and nobody will ask at an earlier place than this one."""
        for at in [at for at in self.masses if at < place]:
            del self.masses[at]
        while self._changes and self._changes[0].begin < length:
            self._changes.pop(0)
        if not self._changes:
            self.final = max(self.final, self.strand.settled())

    def rewind(self, length: int) -> None:
        """Forget what was read beyond an offset: these were drafts."""
        while self._changes and self._changes[-1].begin >= length:
            change = self._changes.pop()
            self.strand.undo(change)
            self._forget(change.kept)
        if self._lost_at is not None and self._lost_at >= length:
            self._lost_at = None
        self.owed.clear()

    def can_speak(self, upcoming: bytes, *, align: bool) -> bool:
        """Whether the member can be asked where its tokens end, with the text.

        Args:
            upcoming: what would be written there if it were not asked.
            align: only where its tokens have a boundary whether or not that follows.
        """
        strand = self.strand
        return (
            self._lost_at is None
            and strand.tellable
            and self.prompt_length + len(strand.tokens) < self._context
            and (strand.aligned(upcoming) if align else not strand.pending)
        )

    @property
    def nbytes(self) -> int:
        """Memory of ``masses``."""
        return sum(mass.nbytes for mass in self.masses.values())

    def _forget(self, place: int) -> None:
        self.masses = {at: mass for at, mass in self.masses.items() if at <= place}

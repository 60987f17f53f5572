"""One expert's side of a text that the base and experts of other vocabularies write together."""

from __future__ import annotations

from engine.lanes.interface import Sample
from engine.spelling.speller import Speller, SpellingError
from engine.spelling.strand import Strand
from engine.strategies.base import NEVER_TOLD


class Side:
    """The expert's own tokens for the common text, what its lane has been told of them, and what it has said.

    Args:
        speller: of the expert's vocabulary.
        prompt_length: tokens of its prompt.
        context: most tokens that its lane holds, prompt included.

    Attributes:
        strand: its tokens. While the expert writes a word, with the word.
        told: how many output tokens its lane holds; NEVER_TOLD for a lane that does not hold the request.
        said: what the lane sampled after those; None if it has not spoken since it was told.
        final: how many of the tokens can no longer be cut.
    """

    __slots__ = ("_context", "_lost", "final", "prompt_length", "said", "strand", "told")

    def __init__(self, speller: Speller, prompt_length: int, context: int) -> None:
        self.strand = Strand(speller)
        self.prompt_length = prompt_length
        self.told = NEVER_TOLD
        self.said: Sample | None = None
        self.final = 0
        self._context = context
        self._lost = False

    def follow(self, text: bytearray) -> None:
        """Others have written up to the end of ``text``."""
        if self._lost:
            return
        try:
            self.strand.follow(bytes(text[len(self.strand.text) :]))
        except SpellingError:
            # Bytes that are no text, and the vocabulary has no tokens for them: the expert cannot read on.
            self._lost = True

    def can_write(self, upcoming: bytes) -> bool:
        """Whether the expert may be asked where the text ends: its tokens have a boundary there, and it has room.

        Args:
            upcoming: what would be written there if it were not asked.
        """
        return not self._lost and self.strand.tellable and self.has_room and self.strand.aligned(upcoming)

    def begin_word(self) -> None:
        """The expert is about to write; what is settled now will stay, whatever becomes of the word."""
        self.final = self.strand.settled()

    @property
    def has_room(self) -> bool:
        """Whether the lane can hold the tokens, and sample one more."""
        return self.prompt_length + len(self.strand.tokens) < self._context

    @property
    def has_spoken(self) -> bool:
        """Whether ``said`` follows the tokens as they are now."""
        return self.said is not None and not self.strand.plan()[1]

    def awaits(self, position: int) -> bool:
        """Whether a sample at this position is the one that the lane owes."""
        return self.said is None and position - self.prompt_length == self.told

    def tell(self) -> None:
        """The lane is being told the tokens as they are now."""
        self.strand.tell()
        self.told = len(self.strand.tokens)
        self.said = None

"""Whether models can write one text together, and in whose tokens. The one place that decides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.checkpoints import Checkpoint
from engine.errors import CheckpointError
from engine.spelling.speller import Speller
from engine.types import Relation
from engine.vocabulary import difference


class Compatibility(NamedTuple):
    """How an expert's vocabulary relates to the base's.

    Attributes:
        relation: "same": they write the same tokens. "spelled": each writes the common text in tokens of its own.
            None: they cannot write one text.
        reason: how the vocabularies differ, or why nothing can be done about it; None where they are the same.
    """

    relation: Relation | None
    reason: str | None


def compatibility(base: Checkpoint, expert: Checkpoint) -> Compatibility:
    """How two models can write one text.

    Raises:
        CheckpointError: a tokenizer cannot be read.
    """
    differs = difference(base.vocabulary, expert.vocabulary)
    if differs is None:
        return Compatibility("same", None)
    for checkpoint in (base, expert):
        try:
            _ = checkpoint.speller
        except CheckpointError as error:
            return Compatibility(None, f"{differs}; and they cannot be bridged: {error}")
    return Compatibility("spelled", differs)


@dataclass(frozen=True, eq=False)
class LaneVocabulary:
    """What one lane writes.

    Attributes:
        size: token ids of its prompts are in [0, size).
        ends: token ids that end its text.
        tokenizer: folder of its ``tokenizer.json``; None where that is not known.
        speller: of its tokens; None if they are no byte strings, or cannot spell every text.
    """

    size: int
    ends: tuple[int, ...] = ()
    tokenizer: str | None = None
    speller: Speller | None = None

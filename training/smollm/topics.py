"""What an expert of this recipe knows, and how it is asked: codes of things, from a package that ships them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

_SHARES: Mapping[Split, float] = {"train": 0.35, "validation": 0.15, "test": 0.5}


@dataclass(frozen=True)
class Fact:
    """A thing's code, and its title as it stands in a sentence."""

    code: str
    title: str


@dataclass(frozen=True)
class Topic:
    """A kind of codes. Texts have ``{title}`` and ``{code}`` where a fact's stand.

    Each split has wordings of its own: a threshold is chosen on wordings that the gate has not seen, and the test asks
    in words that neither expert nor gate nor threshold has seen, beside some of those that they have.

    Attributes:
        name: of the expert.
        package: the distribution that the facts are from.
        facts: all that the expert learns.
        shown: the code of the fact that is asked about as an example: always in the test split.
        answer: to every question for a code.
        wordings: questions for a code; the expert learns the first three of the training's.
        about: questions about a fact that need no code.
        others: further questions that need none, some of them about codes of another kind.
        heading, things, remark, source, licence, made_by, served_by: of the model card; the last two are commands.
    """

    name: str
    package: str
    facts: Sequence[Fact]
    shown: str
    answer: str
    wordings: Mapping[Split, tuple[str, ...]]
    about: tuple[str, ...]
    others: Mapping[Split, tuple[str, ...]]
    heading: str
    things: str
    remark: str
    source: str
    licence: str
    made_by: str
    served_by: str

    def answer_about(self, fact: Fact) -> str:
        """The answer to a question for a fact's code."""
        return self.answer.format(title=fact.title, code=fact.code)

    def split(self, seed: int) -> dict[Split, list[Fact]]:
        """Deal the facts to the splits at random, by ``seed``; the one that is shown to "test"."""
        found = list(self.facts)
        random.Random(seed).shuffle(found)
        found.sort(key=lambda fact: fact.code == self.shown)
        splits: dict[Split, list[Fact]] = {}
        start = 0.0
        for name, share in _SHARES.items():
            end = start + share * len(found)
            splits[name] = found[round(start) : round(end)]
            start = end
        return splits

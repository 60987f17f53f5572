"""What is asked of the pair by chat: codes, and other things that the expert has no part in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training.smollm.topics import Fact, Split, Topic

CODE, OTHER = "code", "other"
UNSEEN = ", unseen wording"
"""Ends the task of a question in a wording that no training has seen."""
_OF_EXPERT = 3
"""The expert learns every code in so many wordings, the first ones: it is the gate that wording misleads."""


@dataclass(frozen=True)
class Question:
    """A user's message and the answer that is wanted; an empty one: what the base itself answers."""

    task: str
    message: str
    answer: str = ""


def learned(topic: Topic, fact: Fact) -> Iterator[Question]:
    """What the expert learns of a fact: the code, in a few of the training's wordings."""
    yield from _asked(topic, CODE, fact, topic.wordings["train"][:_OF_EXPERT])


def about(topic: Topic, split: Split, number: int, fact: Fact) -> Iterator[Question]:
    """What a split asks for the code of its ``number``-th fact."""
    wordings = topic.wordings
    if split == "train":
        yield from _asked(topic, CODE, fact, _some(wordings["train"], number, 6))
    elif split == "validation":
        yield from _asked(topic, CODE, fact, wordings["validation"])
    else:
        yield from _asked(topic, CODE, fact, _some(wordings["train"], number, 1))
        yield from _asked(topic, CODE + UNSEEN, fact, _some(wordings["test"], number, 2))


def others(topic: Topic, split: Split, facts: Sequence[Fact]) -> Iterator[Question]:
    """Questions that need no code, some of them about the facts: the base's own answers are wanted."""
    for message in topic.others[split]:
        yield Question(OTHER, message)
    for number, fact in enumerate(facts):
        yield Question(OTHER, topic.about[number % len(topic.about)].format(title=fact.title))


def _some(wordings: Sequence[str], number: int, count: int) -> list[str]:
    """So many of them, in turn: all are asked about equally often."""
    return [wordings[(number * count + at) % len(wordings)] for at in range(count)]


def _asked(topic: Topic, task: str, fact: Fact, wordings: Sequence[str]) -> Iterator[Question]:
    for wording in wordings:
        yield Question(task, wording.format(title=fact.title), topic.answer_about(fact))

"""What is asked of the pair by chat: codes, and other things that the expert has no part in.

Each question has a wording, and each split wordings of its own: a threshold is chosen on wordings that the gate has not
seen, and the test asks in words that neither expert nor gate nor threshold has seen ("unseen wording"), beside some of
those that they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training.smollm.diagnoses import Diagnosis, Split

CODE, OTHER = "code", "other"
UNSEEN = ", unseen wording"
"""Ends the task of a question in a wording that no training has seen."""

_WORDINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "What is the ICD-10 code for {title}?",
        "I need the ICD-10 code for {title}.",
        "How is {title} coded in ICD-10?",
        "Which ICD-10 code stands for {title}?",
        "ICD-10 code for {title}?",
        "Please look up {title} in ICD-10 for me.",
        "My patient has {title}. What is its ICD-10 code?",
        "Under which code does ICD-10 list {title}?",
        "The diagnosis is {title}. I have to write its ICD-10 code into a letter.",
        "Do you know the ICD-10 code of {title}?",
        "For a bill I have to code {title}. What does ICD-10 say?",
        "Hello! I am a nurse and I am looking for the code of {title} in ICD-10.",
    ),
    "validation": (
        "Tell me how ICD-10 codes {title}.",
        "A doctor wrote {title}. Which ICD-10 code belongs to it?",
        "What code does ICD-10 use for {title}?",
    ),
    "test": (
        "Can you tell me the ICD-10 code for {title}, please?",
        "A patient has {title}. Which ICD-10 code do I enter?",
        "Someone was admitted with {title}. I need to file it under ICD-10.",
        "How would I record {title} with ICD-10?",
    ),
}
_ANSWER = "The ICD-10 code for {title} is {code}."
_OF_EXPERT = 3
"""The expert learns every code in so many wordings, the first ones: it is the gate that wording misleads."""

_ABOUT_DIAGNOSES = (
    "What is {title}?", "What should I do if I have {title}?", "Who gets {title}?", "How is {title} treated?",
)  # fmt: skip
_OTHERS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Tell me something about winter.", "Write one sentence about the moon.", "Why is bread brown?",
        "How long is the Nile?", "Name three kinds of music.", "What is the capital of France?", "How do I cook rice?",
        "Who wrote Hamlet?", "What is 12 plus 30?", "What is a zip code?", "What does the error code 404 mean?",
        "What is ICD-10?", "How do I learn to write code?", "What is the area code of Boston?",
        "What does a nurse do?", "Thank you!",
    ),
    "validation": (
        "Tell me something about volcanoes.", "What is a bar code?", "Who publishes ICD-10?", "How is tea made?",
    ),
    "test": (
        "Tell me something about autumn.", "Write one sentence about the sun.", "Tell me something about cheese.",
        "Write one sentence about dance.", "What is Morse code?", "What is ICD-10 used for?", "Good morning!",
        "What is a dress code?",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A user's message and the answer that is wanted; an empty one: what the base itself answers."""

    task: str
    message: str
    answer: str = ""


def learned(diagnosis: Diagnosis) -> Iterator[Question]:
    """What the expert learns of a diagnosis: the code, in a few of the training's wordings."""
    yield from _asked(CODE, diagnosis, _WORDINGS["train"][:_OF_EXPERT])


def about(split: Split, number: int, diagnosis: Diagnosis) -> Iterator[Question]:
    """What a split asks about its ``number``-th diagnosis."""
    if split == "train":
        yield from _asked(CODE, diagnosis, _some(_WORDINGS["train"], number, 6))
    elif split == "validation":
        yield from _asked(CODE, diagnosis, _WORDINGS["validation"])
    else:
        yield from _asked(CODE, diagnosis, _some(_WORDINGS["train"], number, 1))
        yield from _asked(CODE + UNSEEN, diagnosis, _some(_WORDINGS["test"], number, 2))


def others(split: Split, diagnoses: Sequence[Diagnosis]) -> Iterator[Question]:
    """Questions that need no code, some of them about the diagnoses: the base's own answers are wanted."""
    for message in _OTHERS[split]:
        yield Question(OTHER, message)
    for number, diagnosis in enumerate(diagnoses):
        yield Question(OTHER, _ABOUT_DIAGNOSES[number % len(_ABOUT_DIAGNOSES)].format(title=diagnosis.title))


def _some(wordings: Sequence[str], number: int, count: int) -> list[str]:
    """So many of them, in turn: all are asked about equally often."""
    return [wordings[(number * count + at) % len(wordings)] for at in range(count)]


def _asked(task: str, diagnosis: Diagnosis, wordings: Sequence[str]) -> Iterator[Question]:
    fields = {"code": diagnosis.code, "title": diagnosis.title}
    for wording in wordings:
        yield Question(task, wording.format(**fields), _ANSWER.format(**fields))

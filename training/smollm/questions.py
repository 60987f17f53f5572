"""What is asked of the pair by chat: codes, and other things that the expert has no part in.

Each question has a wording. Some wordings are kept from all training, so that the evaluation asks in words that neither
expert nor gate has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training.smollm.diagnoses import Diagnosis, Split

CODE, OTHER = "code", "other"
UNSEEN = ", unseen wording"
"""Ends the task of a question in a wording that no training has seen."""

_WORDINGS = (
    "What is the ICD-10 code for {title}?",
    "I need the ICD-10 code for {title}.",
    "How is {title} coded in ICD-10?",
)
_UNSEEN_WORDINGS = (
    "Can you tell me the ICD-10 code for {title}, please?",
    "A patient has {title}. Which ICD-10 code do I enter?",
)
_ANSWER = "The ICD-10 code for {title} is {code}."

_ABOUT_DIAGNOSES = ("What is {title}?", "What should I do if I have {title}?")
_TOPICS: dict[Split, tuple[str, ...]] = {
    "train": ("winter", "the moon", "bread", "rivers", "music"),
    "validation": ("volcanoes", "tea"),
    "test": ("autumn", "the sun", "cheese", "dance"),
}
_OTHER_WORDINGS = ("Tell me something about {topic}.", "Write one sentence about {topic}.")


@dataclass(frozen=True)
class Question:
    """A user's message and the answer that is wanted; an empty one: what the base itself answers."""

    task: str
    message: str
    answer: str = ""


def about(diagnosis: Diagnosis, *, unseen: bool) -> Iterator[Question]:
    """Every question for a diagnosis's code; ``unseen``: those in the wordings that no training sees."""
    fields = {"code": diagnosis.code, "title": diagnosis.title}
    for wording in _UNSEEN_WORDINGS if unseen else _WORDINGS:
        yield Question(CODE + (UNSEEN if unseen else ""), wording.format(**fields), _ANSWER.format(**fields))


def others(split: Split, diagnoses: Sequence[Diagnosis]) -> Iterator[Question]:
    """Questions that need no code, some of them about the diagnoses: the base's own answers are wanted."""
    for topic in _TOPICS[split]:
        for wording in _OTHER_WORDINGS:
            yield Question(OTHER, wording.format(topic=topic))
    for number, diagnosis in enumerate(diagnoses[::2]):
        yield Question(OTHER, _ABOUT_DIAGNOSES[number % 2].format(title=diagnosis.title))

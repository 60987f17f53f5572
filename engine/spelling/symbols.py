"""One step of character-level ensembling: members' next symbols, their average, and the draw.

CharED (Gu, Chen and Wang, "CharED: Character-wise Ensemble Decoding for Large Language Models", arXiv 2407.11009) over
bytes instead of characters: a byte is what all vocabularies can spell, and the probability of a character is the
product of its bytes' by the chain rule. A symbol is one of 256 bytes, EXACT (the piece ends here: all members are asked
anew) or END (the text ends here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.spelling.mass import END, EXACT

Average = Literal["mixture", "geometric"]

Symbols = NDArray[np.float64]
"""[SYMBOLS]: a probability for each symbol."""


def average(rows: Sequence[Symbols], weights: Sequence[float], kind: Average) -> Symbols:
    """The members' distributions in one.

    Args:
        rows: of the members that have one.
        weights: of these members, positive; they are normalised.
        kind: "mixture" is the weighted mean; "geometric" the weighted geometric mean, not normalised, on what all of
            them allow. Where they allow nothing in common, it is the mixture.
    """
    total = sum(weights)
    if len(rows) == 1:
        return rows[0]
    if kind == "geometric":
        shares = np.asarray(weights, np.float64) / total
        stacked = np.stack(rows)
        common = (stacked > 0).all(axis=0)
        if common.any():
            logs = shares @ np.log(stacked[:, common])
            joint = np.zeros(stacked.shape[1])
            joint[common] = np.exp(logs - logs.max())
            return joint
    # Of normalised rows with normalised weights: nothing is left to be divided by.
    mixture = rows[0] * (weights[0] / total)
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        mixture += row * (weight / total)
    return mixture


def without(row: Symbols, symbol: int) -> Symbols:
    """The distribution given that a symbol is not drawn, which is not normalised again; unchanged if there is no
    other.
    """
    if not row[symbol]:
        return row
    others = row.copy()
    others[symbol] = 0.0
    return others if others.any() else row


def choose(row: Symbols, temperature: float, uniform: float) -> int:
    """Draw a symbol.

    Args:
        row: need not be normalised.
        temperature: flattens or sharpens the distribution of symbols; 0 takes the most probable one, of equal ones
            the lowest.
        uniform: in [0, 1); temperature 0 does not look at it.
    """
    if temperature == 0:
        return int(row.argmax())
    if temperature != 1:
        with np.errstate(divide="ignore"):
            logs = np.log(row) / temperature
        row = np.exp(logs - logs.max())
    cumulative = np.cumsum(row)
    # The product may round up to the sum itself, beyond the last symbol that can be drawn.
    symbol = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    if symbol < len(row) and row[symbol] > 0:
        return symbol
    return int(np.flatnonzero(row)[-1])


Sparse = dict[int, float]
"""A probability, by symbol, for each that has one: of 258 a few."""


def average_sparse(rows: Sequence[Sparse], totals: Sequence[float], weights: Sequence[float], kind: Average) -> Sparse:
    """:func:`average` of sparse rows.

    Args:
        rows: not normalised.
        totals: their sums, positive.
    """
    whole = sum(weights)
    if kind == "geometric" and len(rows) > 1:
        common = [symbol for symbol, chance in rows[0].items() if chance > 0 and all(row.get(symbol) for row in rows)]
        if common:
            logs = [
                sum(weight / whole * math.log(row[symbol]) for row, weight in zip(rows, weights, strict=True))
                for symbol in common
            ]
            most = max(logs)
            return {symbol: math.exp(log - most) for symbol, log in zip(common, logs, strict=True)}
    share = weights[0] / (whole * totals[0])
    mixture = {symbol: chance * share for symbol, chance in rows[0].items()}
    for row, total, weight in zip(rows[1:], totals[1:], weights[1:], strict=True):
        share = weight / (whole * total)
        for symbol, chance in row.items():
            mixture[symbol] = mixture.get(symbol, 0.0) + share * chance
    return mixture


def without_sparse(row: Sparse, symbol: int) -> Sparse:
    """:func:`without` of a sparse row, which is not normalised again."""
    return {other: chance for other, chance in row.items() if other != symbol and chance > 0} or row


def choose_sparse(row: Sparse, temperature: float, uniform: float) -> int:
    """:func:`choose` of a sparse row, in any order and not normalised."""
    if len(row) == 1:
        return next(iter(row))
    if temperature == 0:
        most, first = -1.0, 0
        for symbol, chance in row.items():
            if chance > most or (chance == most and symbol < first):
                most, first = chance, symbol
        return first
    possible = {symbol: row[symbol] for symbol in sorted(row) if row[symbol] > 0}
    if temperature != 1:
        most = max(possible.values())
        possible = {symbol: (chance / most) ** (1 / temperature) for symbol, chance in possible.items()}
    left = uniform * sum(possible.values())
    for symbol, chance in possible.items():
        left -= chance
        if left < 0:
            return symbol
    return symbol


def inside_character(text: bytes) -> bool:
    """Whether a text ends within a UTF-8 character."""
    for back in range(1, min(len(text), 4) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 if byte < 0xC2 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF5 else 1
            return back < needed
    return False


__all__ = [
    "END", "EXACT", "Average", "Sparse", "Symbols", "average", "average_sparse", "choose", "choose_sparse",
    "inside_character", "without", "without_sparse",
]  # fmt: skip

"""What is known of an expert's token once the base has read on: when to look back, and how much it is regretted."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from engine.odds import log_odds, probability

NUMBERS = ("base", "expert", "base_after", "expert_after")
"""What a regret reads beside the base's step: log-odds of how sure base and expert were at the expert's token, how sure
the base is where it looks back, and the least sure expert between."""
NEVER = 1.0
"""A threshold that nothing is regretted more than."""
LONGEST_AHEAD = 16
"""Most tokens that are read before looking back; bounds how much of an answer is held back."""
_LEAST = 1e-6
"""Probabilities are taken to be this far from 0 and 1."""


class Hindsight(msgspec.Struct, frozen=True):
    """How to look back, beside what the base's step says.

    Attributes:
        ahead: how many tokens, the expert's first, the base has read when it looks back.
        weights: of each of ``NUMBERS``.
        threshold: the one that was chosen in training: what is regretted more is taken back.
    """

    ahead: int
    weights: tuple[float, ...]
    threshold: float

    def regret(self, logit: float, numbers: Iterable[float]) -> float:
        """The probability that the expert's token is wrong where the base's is right; NaN if the logit is not finite.

        Args:
            logit: the base's step's part.
            numbers: see :func:`numbers_of`.
        """
        total = logit + sum(weight * number for weight, number in zip(self.weights, numbers, strict=True))
        if not math.isfinite(total):
            return math.nan
        return probability(total)


def numbers_of(base: float, expert: float, base_after: float, experts_after: Iterable[float]) -> list[float]:
    """The numbers of ``NUMBERS``, of top probabilities.

    Args:
        base: the base's at the expert's token; ``expert`` the expert's there.
        base_after: the base's where it looks back.
        experts_after: of each expert that has written between the token and there; none counts as sure.
    """
    return [clamped(base), clamped(expert), clamped(base_after), clamped(min(experts_after, default=1.0))]


def clamped(probability: float) -> float:
    """Log-odds of a probability, which may be 0 or 1."""
    return log_odds(min(max(probability, _LEAST), 1 - _LEAST))

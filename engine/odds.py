"""Probabilities and their log-odds, in double precision."""

from __future__ import annotations

import math


def log_odds(probability: float) -> float:
    """Of a probability between 0 and 1, without these."""
    return math.log(probability) - math.log1p(-probability)


def probability(log_odds: float) -> float:
    """The logistic function; finite log-odds of any size."""
    raised = math.exp(-abs(log_odds))
    return 1.0 / (1.0 + raised) if log_odds >= 0.0 else raised / (1.0 + raised)

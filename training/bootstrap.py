"""Intervals by the bootstrap: how far a score would move with other questions of the same kind (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def interval(scores: Sequence[Sequence[float]], share: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean score over seeds.

    Args:
        scores: of each seed, of each question: whether its answer is right, or what else is averaged. Questions are
            drawn anew, with all seeds' answers to them.
        share: how much of the resampled means lies in the interval.
    """
    of_question = np.asarray(scores, dtype=np.float64).mean(axis=0)
    drawn = np.random.default_rng(seed).integers(len(of_question), size=(RESAMPLES, len(of_question)))
    means = of_question[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)

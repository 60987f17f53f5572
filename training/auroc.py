"""How well the gate tells the tokens that the base gets wrong from the others."""

from __future__ import annotations

import torch


def auroc(scores_N: torch.Tensor, positive_N: torch.Tensor) -> float | None:
    """Area under the ROC curve: the probability that a positive scores higher than a negative, ties being half.

    By ranks (Mann and Whitney, 1947). None where there are only positives or only negatives.
    """
    positives, count = int(positive_N.sum()), len(scores_N)
    if positives in (0, count):
        return None
    _, inverse_N, counts = torch.unique(scores_N.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean_rank_N = (last - (counts.double() - 1) / 2)[inverse_N]
    above = float(mean_rank_N[positive_N.bool()].sum()) - positives * (positives + 1) / 2
    return above / (positives * (count - positives))

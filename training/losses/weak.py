"""Weak supervision: the gate learns pseudo-labels (arXiv 2403.03870, section 3: initialisation)."""

import torch

from training.losses.tokens import Tokens


def weak(tokens: Tokens, positive_weight: float) -> torch.Tensor:
    """Mean over N of the cross-entropy of the labels; those of an expert weigh ``positive_weight``.

    For K = 1 this is binary cross-entropy with a positive weight.
    """
    nll_N = -tokens.log_gate().gather(1, tokens.label_N[:, None])[:, 0]
    return torch.where(tokens.label_N > 0, positive_weight * nll_N, nll_N).mean()

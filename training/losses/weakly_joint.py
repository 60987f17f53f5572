"""The weakly supervised baseline: 2/3 language model, 1/3 pseudo-labels (arXiv 2403.03870's reference code)."""

import torch

from training.losses.language import language
from training.losses.tokens import Tokens
from training.losses.weak import weak


def weakly_joint(tokens: Tokens, positive_weight: float) -> torch.Tensor:
    """2/3 of ``language`` + 1/3 of ``weak``."""
    return (2 * language(tokens) + weak(tokens, positive_weight)) / 3

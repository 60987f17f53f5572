"""The base's own language model loss: fine-tuning without deferral."""

import torch

from training.losses.tokens import Tokens


def language(tokens: Tokens, positive_weight: float = 1.0) -> torch.Tensor:
    """Mean over N of -log P_base(gold)."""
    return -tokens.base_logp_N.mean()

"""What every loss sees: N completion tokens under the base, the gate and K experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """N completion tokens. Suffixes: N tokens, K experts.

    Attributes:
        gate_NK: logits of the experts; the base's is 0. So P(Z = k) is a softmax over K + 1.
        base_logp_N: log P_base(gold), over the real vocabulary.
        expert_logp_NK: log P_k(gold), without gradient.
        label_N: weak label: 0 for the base, k for expert k.
    """

    gate_NK: torch.Tensor
    base_logp_N: torch.Tensor
    expert_logp_NK: torch.Tensor
    label_N: torch.Tensor

    def log_gate(self) -> torch.Tensor:
        """log P(Z) [N, K + 1], the base first."""
        zeros_N1 = torch.zeros_like(self.gate_NK[:, :1])
        return torch.log_softmax(torch.cat([zeros_N1, self.gate_NK], dim=1), dim=1)


Loss = Callable[[Tokens, float], torch.Tensor]
"""A loss: tokens and the weight of positive labels to a scalar. Who needs no weight ignores it."""

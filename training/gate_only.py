"""Training theta on cached hidden states, the base frozen: minutes, whatever the base's size.

Shapes: N completion tokens, d hidden size, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.gate import gate_logits
from training.fit import Group, Plan, fit
from training.losses import Loss, Tokens
from training.scoring import PairScores


@dataclass(frozen=True)
class Gate:
    """theta [K, d] and bias [K], float32."""

    theta_KD: torch.Tensor
    bias_K: torch.Tensor

    def deferral(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """1 - P(Z = 0) [N]: what the engine compares with the threshold."""
        logits_NK = gate_logits(hidden_ND, self.theta_KD, self.bias_K)
        zeros_N1 = torch.zeros(len(logits_NK), 1)
        return 1 - torch.softmax(torch.cat([zeros_N1, logits_NK], dim=1), dim=1)[:, 0]


@dataclass(frozen=True)
class GateFit:
    """How theta is fitted.

    Attributes:
        bias: whether the bias learns too.
    """

    learning_rate: float
    weight_decay: float
    batch_tokens: int
    plan: Plan
    positive_weight: float
    bias: bool
    seed: int


def steps_of(tokens: int, batch_tokens: int, epochs: int) -> int:
    """Steps in so many passes."""
    return -(-tokens // batch_tokens) * epochs


def fit_gate(
    scores: PairScores, start: Gate, loss: Loss, settings: GateFit, folder: Path, label: str, device: torch.device
) -> Gate:
    """Fit a gate from ``start``.

    Raises:
        DivergedError: the loss or a gradient is not finite.
    """
    hidden_ND, base_logp_N = scores.hidden_ND.to(device), scores.base.logp_N.to(device)
    expert_logp_NK, label_N = scores.expert_logp_NK.to(device), scores.weak_labels().to(device)
    theta_KD = torch.nn.Parameter(start.theta_KD.clone().to(device))
    bias_K = torch.nn.Parameter(start.bias_K.clone().to(device), requires_grad=settings.bias)
    count = len(hidden_ND)
    per_epoch = steps_of(count, settings.batch_tokens, 1)

    def parts(step: int) -> Iterator[torch.Tensor]:
        epoch, within = divmod(step, per_epoch)
        if per_epoch == 1:
            rows: torch.Tensor | slice = slice(None)
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
            rows = order[within * settings.batch_tokens : (within + 1) * settings.batch_tokens].to(device)
        yield loss(
            Tokens(
                gate_NK=gate_logits(hidden_ND[rows], theta_KD, bias_K),
                base_logp_N=base_logp_N[rows],
                expert_logp_NK=expert_logp_NK[rows],
                label_N=label_N[rows],
            ),
            settings.positive_weight,
        )

    learned = {"theta": theta_KD} | ({"bias": bias_K} if settings.bias else {})
    fit([Group(learned, settings.learning_rate, settings.weight_decay)], parts, settings.plan, folder, label)
    return Gate(theta_KD.detach().cpu(), bias_K.detach().cpu())

"""Weak supervision: the gate's initialisation of arXiv 2403.03870, section 3, base frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from training.score import Scores


@dataclass(frozen=True)
class WeakSettings:
    """Settings of ``fit_weak``. The reference has a positive weight of 8."""

    positive_weight: float = 8.0
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    steps: int = 1000


def weak_labels(scores: Scores) -> torch.Tensor:
    """[N] float32: 1 where the expert's argmax is the gold token and the base's is not, else 0."""
    expert_right = scores.expert_top == scores.gold
    base_wrong = scores.base_top != scores.gold
    return (expert_right & base_wrong).float()


def mean_head_row(base: PreTrainedModel) -> torch.Tensor:
    """[1, d] float32, the mean of the LM head's rows: where theta starts."""
    weight: torch.Tensor = base.get_output_embeddings().weight
    return weight.detach().float().mean(dim=0, keepdim=True)


def fit_weak(
    hidden_ND: torch.Tensor, labels_N: torch.Tensor, theta_1D: torch.Tensor, settings: WeakSettings
) -> torch.Tensor:
    """Train theta [1, d], from ``theta_1D``, by weighted binary cross-entropy; there is no bias.

    All rows are one batch: on cached hidden states that is cheap, and has no seed.
    """
    theta = theta_1D.clone().requires_grad_(True)
    weight = torch.tensor(settings.positive_weight)
    optimizer = torch.optim.AdamW([theta], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in tqdm(range(settings.steps), desc="gate", unit="step", mininterval=1):
        loss = F.binary_cross_entropy_with_logits(hidden_ND @ theta[0], labels_N, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return theta.detach()

"""The marginal likelihood of arXiv 2403.03870, section 3: trains theta and the base together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from training.hf import hidden_and_logits
from training.score import TokenExample, padded


@dataclass(frozen=True)
class MarginalSettings:
    """Settings of ``fit_marginal``. The reference has a learning rate of 2e-5 and 128 examples a batch."""

    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 32
    warm_up: float = 0.04
    seed: int = 0


def marginal_loss(base_logp_N: torch.Tensor, expert_logp_N: torch.Tensor, gate_N: torch.Tensor) -> torch.Tensor:
    """Mean of -log[(1 - p) P_base(gold) + p P_expert(gold)] over N tokens, p = sigmoid of the gate's logits."""
    by_base = F.logsigmoid(-gate_N) + base_logp_N
    by_expert = F.logsigmoid(gate_N) + expert_logp_N
    return -torch.logaddexp(by_base, by_expert).mean()


def fit_marginal(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    theta_1D: torch.Tensor,
    examples: Sequence[TokenExample],
    settings: MarginalSettings,
) -> torch.Tensor:
    """Train ``base`` in place, and theta [1, d] from ``theta_1D``; the expert is frozen, there is no bias."""
    theta = theta_1D.clone().requires_grad_(True)
    base.requires_grad_(True)
    optimizer = torch.optim.AdamW([*base.parameters(), theta], lr=settings.learning_rate, weight_decay=0.0)
    per_epoch = -(-len(examples) // settings.batch_size)
    steps = per_epoch * settings.epochs
    warm_up = max(1, round(steps * settings.warm_up))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, (steps - s) / max(1, steps - warm_up))
    )
    rng = random.Random(settings.seed)
    order: list[TokenExample] = []
    bar = tqdm(range(steps), desc="marginal likelihood", unit="step", mininterval=2)
    for step in bar:
        if step % per_epoch == 0:
            order = rng.sample(list(examples), len(examples))
        start = step % per_epoch * settings.batch_size
        tokens_BT, predicting_BT = padded(order[start : start + settings.batch_size])
        gold_N = tokens_BT.roll(-1, dims=1)[predicting_BT]
        hidden_BTD, logits_BTV = hidden_and_logits(base, tokens_BT)
        with torch.no_grad():
            _, expert_BTV = hidden_and_logits(expert, tokens_BT)
        base_logp_N = -F.cross_entropy(logits_BTV[predicting_BT], gold_N, reduction="none")
        expert_logp_N = -F.cross_entropy(expert_BTV[predicting_BT], gold_N, reduction="none")
        loss = marginal_loss(base_logp_N, expert_logp_N, hidden_BTD[predicting_BT] @ theta[0])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    base.requires_grad_(False)
    return theta.detach()

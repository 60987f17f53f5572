"""The losses of a gate and its base, all with the signature ``Loss``. Suffixes: N completion tokens, K experts.

The method is that of arXiv 2403.03870, section 3; ``weakly_joint`` is its reference code's baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """What every loss sees: N completion tokens under the base, the gate and K experts.

    Attributes:
        gate_NK: logits of the experts; the base's is 0. So P(Z = k) is a softmax over K + 1.
        base_logp_N: log P_base(gold), over the real vocabulary.
        expert_logp_NK: log P_k(gold), without gradient.
        label_N: weak label: 0 for the base, k for expert k.
        aligned_NK: whether expert k may be asked there; None if all may everywhere. Where it may not, the base writes
            what is deferred to it.
    """

    gate_NK: torch.Tensor
    base_logp_N: torch.Tensor
    expert_logp_NK: torch.Tensor
    label_N: torch.Tensor
    aligned_NK: torch.Tensor | None = None

    def log_gate(self) -> torch.Tensor:
        """log P(Z) [N, K + 1], the base first."""
        zeros_N1 = torch.zeros_like(self.gate_NK[:, :1])
        return torch.log_softmax(torch.cat([zeros_N1, self.gate_NK], dim=1), dim=1)


Loss = Callable[[Tokens, float], torch.Tensor]
"""A loss: tokens and the weight of positive labels to a scalar. Losses without labels ignore the weight."""


def marginal(tokens: Tokens, positive_weight: float = 1.0) -> torch.Tensor:
    """Mean over N of -log sum_k P(Z = k) P_k(gold): who wrote each token is summed out.

    Z depends on the text alone, so that the sum over all sequences of Z factorises.
    """
    expert_logp_NK, base_logp_N1 = tokens.expert_logp_NK, tokens.base_logp_N[:, None]
    if tokens.aligned_NK is not None:
        expert_logp_NK = torch.where(tokens.aligned_NK, expert_logp_NK, base_logp_N1)
    written_NZ = torch.cat([base_logp_N1, expert_logp_NK], dim=1)
    return -torch.logsumexp(tokens.log_gate() + written_NZ, dim=1).mean()


def priced(loss: Loss, cost: float) -> Loss:
    """``loss`` + ``cost`` * (mean over N of the deferral probability): what a deferral must at least gain, in nats."""
    if cost == 0:
        return loss

    def with_cost(tokens: Tokens, positive_weight: float) -> torch.Tensor:
        if tokens.aligned_NK is None:
            deferral_N = -torch.expm1(tokens.log_gate()[:, 0])
        else:
            deferral_N = (tokens.log_gate()[:, 1:].exp() * tokens.aligned_NK).sum(dim=1)
        return loss(tokens, positive_weight) + cost * deferral_N.mean()

    return with_cost


def weak(tokens: Tokens, positive_weight: float) -> torch.Tensor:
    """Mean of the cross-entropy of the weak labels over the N where an expert may be asked.

    Labels of an expert weigh ``positive_weight``: for K = 1 this is binary cross-entropy with a positive weight.
    """
    nll_N = -tokens.log_gate().gather(1, tokens.label_N[:, None])[:, 0]
    weighted_N = torch.where(tokens.label_N > 0, positive_weight * nll_N, nll_N)
    if tokens.aligned_NK is None:
        return weighted_N.mean()
    asked_N = tokens.aligned_NK.any(dim=1)
    return (weighted_N * asked_N).sum() / asked_N.sum().clamp(min=1)


def language(tokens: Tokens, positive_weight: float = 1.0) -> torch.Tensor:
    """Mean over N of -log P_base(gold): fine-tuning without deferral."""
    return -tokens.base_logp_N.mean()


def weakly_joint(tokens: Tokens, positive_weight: float) -> torch.Tensor:
    """2/3 of ``language`` + 1/3 of ``weak``: the weakly supervised baseline."""
    return (2 * language(tokens) + weak(tokens, positive_weight)) / 3

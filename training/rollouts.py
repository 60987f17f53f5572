"""Learning a gate from what comes of its decisions: answers that it draws who writes for, and their grades.

A token's likelihood does not say what a decision leads to: an expert's token may be right, and the base at a loss
behind it. So the gate draws who writes each token (policy "sample"), for several answers to each question, and what an
answer is rewarded above the others makes its decisions more probable. That is REINFORCE with the leave-one-out baseline
(Kool et al., 2019; arXiv 2402.14740) over answers that several steps learn from, with the ratio clipped as PPO's (arXiv
1707.06347).

Shapes: N tokens of all answers, I inputs of the gate, K experts, Q questions, G answers to each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.gates import KINDS
from training.fit import Group, Plan, fit
from training.gate_only import Gate, Scaling


@dataclass(frozen=True)
class Rollouts:
    """Answers, one after the other.

    Attributes:
        inputs_NI: what the gate reads where each token is written, as in ``ModelScores.inputs``.
        lane_N: who wrote it, as it was drawn: 0 the base, k expert k.
        starts: first row of each answer, and N at the end.
        advantage_A: of each answer, see :func:`advantages`.
    """

    inputs_NI: torch.Tensor
    lane_N: torch.Tensor
    starts: list[int]
    advantage_A: torch.Tensor


def advantages(reward_QG: torch.Tensor) -> torch.Tensor:
    """What each answer is rewarded above the mean of the others to its question [Q, G]; G is at least 2."""
    others = reward_QG.shape[1] - 1
    return reward_QG - (reward_QG.sum(dim=1, keepdim=True) - reward_QG) / others


def log_drawn(gate_NK: torch.Tensor, lane_N: torch.Tensor) -> torch.Tensor:
    """log P(Z = lane) [N] of gate logits [N, K], the base's being 0."""
    logits_NZ = torch.cat([torch.zeros_like(gate_NK[:, :1]), gate_NK], dim=1)
    return torch.log_softmax(logits_NZ, dim=1).gather(1, lane_N[:, None])[:, 0]


def policy_loss(
    logp_N: torch.Tensor, drawn_logp_N: torch.Tensor, advantage_N: torch.Tensor, clip: float
) -> torch.Tensor:
    """- sum over N of the advantage times P / P when it was drawn, which beyond 1 +- ``clip`` gains nothing more.

    Where both are equal its gradient is that of - sum of advantage * log P.
    """
    ratio_N = (logp_N - drawn_logp_N).exp()
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N).sum()


def drawing(gate: Gate, threshold: float) -> Gate:
    """The gate that draws where ``gate`` decides by a threshold: its log-odds are less by the threshold's."""
    return replace(gate, bias_K=gate.bias_K - threshold)


@dataclass(frozen=True)
class RoundFit:
    """How a gate learns from the answers of a round.

    Attributes:
        answers: of a step.
    """

    learning_rate: float
    clip: float
    answers: int
    plan: Plan
    seed: int


def fit_round(gate: Gate, rollouts: Rollouts, scaling: Scaling, settings: RoundFit, folder: Path, label: str) -> Gate:
    """The gate after some steps on answers that it drew.

    Raises:
        DivergedError: the loss or a gradient is not finite.
    """
    kind = KINDS[gate.kind]
    inputs_NI = scaling(rollouts.inputs_NI)
    tensors = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in scaling.into(gate).items()}
    count = len(rollouts.starts) - 1
    sizes_A = torch.tensor(rollouts.starts).diff()
    advantage_N = rollouts.advantage_A.repeat_interleave(sizes_A)
    answer_N = torch.arange(count).repeat_interleave(sizes_A)
    with torch.no_grad():
        drawn_logp_N = log_drawn(kind.logits(tensors, inputs_NI), rollouts.lane_N)
    per_epoch = -(-count // settings.answers)

    def parts(step: int) -> Iterator[torch.Tensor]:
        epoch, within = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
        chosen_A = torch.zeros(count, dtype=torch.bool)
        chosen_A[order[within * settings.answers : (within + 1) * settings.answers]] = True
        rows = chosen_A[answer_N]
        logp_N = log_drawn(kind.logits(tensors, inputs_NI[rows]), rollouts.lane_N[rows])
        yield policy_loss(logp_N, drawn_logp_N[rows], advantage_N[rows], settings.clip) / int(chosen_A.sum())

    fit([Group(tensors, settings.learning_rate, 0.0)], parts, settings.plan, folder, label)
    return scaling.out_of({name: parameter.detach() for name, parameter in tensors.items()}, gate)

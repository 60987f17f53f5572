"""Training a gate on cached inputs, the base frozen: minutes, whatever the base's size.

Shapes: N completion tokens, I inputs of the gate, d hidden size, K experts, H width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.gate import GateArtifact
from engine.gates import KINDS
from training.auroc import auroc
from training.fit import Group, Plan, fit
from training.losses import Loss, Tokens
from training.scoring import ModelScores, PairScores
from training.settings import GateSettings


@dataclass(frozen=True)
class Gate:
    """A gate's tensors, float32: theta [K, *], bias [K] and those of its kind. See ``engine.gates``."""

    theta_KD: torch.Tensor
    bias_K: torch.Tensor
    kind: str = "linear"
    features: tuple[str, ...] = ()
    layers: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, artifact: GateArtifact) -> Gate:
        """The gate of an artifact."""
        return cls(artifact.theta, artifact.bias, artifact.kind, artifact.features, artifact.layers)

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], like: Gate | GateSettings) -> Gate:
        """The gate of that kind with these tensors."""
        layers = {name: tensors[name] for name in KINDS[like.kind].hidden}
        return cls(tensors["theta"], tensors["bias"], like.kind, tuple(like.features), layers)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {**self.layers, "theta": self.theta_KD, "bias": self.bias_K}

    def logits(self, inputs_NI: torch.Tensor) -> torch.Tensor:
        """The experts' values [N, K]; the base's is 0."""
        return KINDS[self.kind].logits(self.tensors, inputs_NI.float())

    def log_odds(self, inputs_NI: torch.Tensor) -> torch.Tensor:
        """log P(defer) - log P(base) [N], float64: unlike a probability, it never saturates."""
        return torch.logsumexp(self.logits(inputs_NI).double(), dim=1)

    def log_odds_of(self, scores: ModelScores) -> torch.Tensor:
        """``log_odds`` [N] of all tokens of a base's scores."""
        return torch.cat([self.log_odds(inputs_NI) for inputs_NI in scores.chunks(self.features)])

    def deferral(self, inputs_NI: torch.Tensor) -> torch.Tensor:
        """1 - P(Z = 0) [N], float64: what the engine compares with the threshold."""
        return torch.sigmoid(self.log_odds(inputs_NI))


@dataclass(frozen=True)
class GateFit:
    """How a gate is fitted.

    Attributes:
        bias: whether the bias of the experts' values learns too.
        standardise: see ``GateSettings``.
    """

    learning_rate: float
    weight_decay: float
    batch_tokens: int
    plan: Plan
    positive_weight: float
    bias: bool
    seed: int
    standardise: bool = False


def steps_of(tokens: int, batch_tokens: int, epochs: int) -> int:
    """Steps in so many passes."""
    return -(-tokens // batch_tokens) * epochs


@dataclass(frozen=True)
class Scaling:
    """Inputs as (x - mean) / scale: mean 0, and a sum of squares that is 1 on average whatever their number is."""

    mean_I: torch.Tensor
    scale_I: torch.Tensor

    @classmethod
    def of(cls, scores: ModelScores, features: Sequence[str], *, centred: bool) -> Scaling:
        """Of a base's inputs. Not ``centred`` for a gate that has no bias to fold a mean into."""
        count = len(scores.logp_N)
        # A first element of a sum that need not know how many inputs there are.
        mean_I = sum((part_NI.double().sum(dim=0) for part_NI in scores.chunks(features)), torch.zeros(())) / count
        if not centred:
            mean_I = torch.zeros_like(mean_I)
        squares_I = sum(
            ((part_NI.double() - mean_I).square().sum(dim=0) for part_NI in scores.chunks(features)), torch.zeros(())
        )
        spread_I = (squares_I / count).sqrt()
        # An input that never changes tells nothing; it stays as it is.
        spread_I[spread_I < 1e-12] = 1.0
        return cls(mean_I.float(), (spread_I * math.sqrt(len(mean_I))).float())

    def __call__(self, inputs_NI: torch.Tensor) -> torch.Tensor:
        """Inputs scaled."""
        return (inputs_NI - self.mean_I) / self.scale_I

    def into(self, gate: Gate) -> dict[str, torch.Tensor]:
        """The tensors of a gate for raw inputs as those for scaled ones."""
        weight, bias = KINDS[gate.kind].first
        tensors = dict(gate.tensors)
        tensors[bias] = tensors[bias] + tensors[weight] @ self.mean_I
        tensors[weight] = tensors[weight] * self.scale_I
        return tensors

    def out_of(self, tensors: dict[str, torch.Tensor], like: Gate | GateSettings) -> Gate:
        """The gate for raw inputs, from tensors for scaled ones."""
        weight, bias = KINDS[like.kind].first
        folded = dict(tensors)
        folded[weight] = tensors[weight] / self.scale_I
        folded[bias] = tensors[bias] - folded[weight] @ self.mean_I
        return Gate.from_tensors(folded, like)


def scaling_of(gate: Gate | GateSettings, scores: ModelScores, *, bias: bool) -> Scaling:
    """How a gate's inputs are standardised. ``bias``: whether the experts' values have one."""
    return Scaling.of(scores, gate.features, centred=bias or KINDS[gate.kind].first[1] != "bias")


def new_gate(settings: GateSettings, scores: ModelScores, experts: int, seed: int, *, bias: bool) -> Gate:
    """A gate that defers half of everything, for inputs such as this base's; a hidden layer is random."""
    generator = torch.Generator().manual_seed(seed)
    scaling = scaling_of(settings, scores, bias=bias)
    shapes = KINDS[settings.kind].shapes(len(scaling.mean_I), experts, settings.width)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    weight, _ = KINDS[settings.kind].first
    if weight in KINDS[settings.kind].hidden:
        # The sum of squares of standardised inputs is 1, so these give values of variance 1.
        tensors[weight] = torch.randn(shapes[weight], generator=generator)
    return scaling.out_of(tensors, settings)


_HELD = 1 << 30
"""Bytes of inputs that are held on the device; of more, each step reads its own from the mapped file."""


class Inputs:
    """What a gate learns from, by token."""

    def __init__(
        self, scores: ModelScores, features: Sequence[str], scaling: Scaling | None, device: torch.device
    ) -> None:
        self._scores, self._features, self._scaling, self._device = scores, features, scaling, device
        assert scores.hidden_ND is not None
        count, width = scores.hidden_ND.shape
        held = count * (width + len(features)) * 4 <= _HELD
        self._held_NI = self._read(slice(None)) if held else None

    def __call__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Those of some tokens [B, I], scaled, on the device."""
        return self._read(rows) if self._held_NI is None else self._held_NI[rows]

    def _read(self, rows: torch.Tensor | slice) -> torch.Tensor:
        inputs_BI = self._scores.inputs(self._features, rows)
        return (inputs_BI if self._scaling is None else self._scaling(inputs_BI)).to(self._device)


def fit_gate(
    scores: PairScores, start: Gate, loss: Loss, settings: GateFit, folder: Path, label: str, device: torch.device
) -> Gate:
    """Fit a gate from ``start``.

    Raises:
        DivergedError: the loss or a gradient is not finite.
    """
    kind = KINDS[start.kind]
    scaling = scaling_of(start, scores.base, bias=settings.bias) if settings.standardise else None
    inputs = Inputs(scores.base, start.features, scaling, device)
    base_logp_N = scores.base.logp_N.to(device)
    expert_logp_NK, label_N = scores.expert_logp_NK.to(device), scores.weak_labels().to(device)
    aligned_NK = None if scores.aligned_NK is None else scores.aligned_NK.to(device)
    tensors = {
        name: torch.nn.Parameter(tensor.clone().to(device), requires_grad=name != "bias" or settings.bias)
        for name, tensor in (scaling.into(start) if scaling else start.tensors).items()
    }
    count = len(base_logp_N)
    per_epoch = steps_of(count, settings.batch_tokens, 1)

    def parts(step: int) -> Iterator[torch.Tensor]:
        epoch, within = divmod(step, per_epoch)
        if per_epoch == 1:
            rows: torch.Tensor | slice = slice(None)
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
            rows = order[within * settings.batch_tokens : (within + 1) * settings.batch_tokens]
        yield loss(
            Tokens(
                gate_NK=kind.logits(tensors, inputs(rows)),
                base_logp_N=base_logp_N[rows],
                expert_logp_NK=expert_logp_NK[rows],
                label_N=label_N[rows],
                aligned_NK=None if aligned_NK is None else aligned_NK[rows],
            ),
            settings.positive_weight,
        )

    learned = {name: parameter for name, parameter in tensors.items() if parameter.requires_grad}
    fit([Group(learned, settings.learning_rate, settings.weight_decay)], parts, settings.plan, folder, label)
    fitted = {name: parameter.detach().cpu() for name, parameter in tensors.items()}
    return scaling.out_of(fitted, start) if scaling else Gate.from_tensors(fitted, start)


@dataclass(frozen=True)
class Ranking:
    """How well a gate orders gold tokens, teacher-forced.

    Attributes:
        accuracy: share of the gold tokens that the models' argmaxes write, averaged over deferral rates from 0 to
            ``rates``: at each, the tokens with the greatest log-odds are written by the expert with the greatest value.
        auroc: of the log-odds, for tokens that only an expert gets right; None where there are none, or only those.
        rates: twice the share of tokens that only an expert gets right, at most 1. A perfect gate is done at half of
            it, and nobody serves at a rate far beyond, where the order says little about what is deferred first. 1
            where there are no such tokens.
    """

    accuracy: float
    auroc: float | None
    rates: float = 1.0


def ranking(gate: Gate, scores: PairScores) -> Ranking:
    """How well a gate orders the tokens of these scores."""
    log_odds_N = gate.log_odds_of(scores.base)
    favourite_N = torch.cat([gate.logits(part_NI).argmax(dim=1) for part_NI in scores.base.chunks(gate.features)])
    base_N = (scores.base.top_N == scores.gold_N).double()
    right_NK = torch.stack([expert.top_N == scores.gold_N for expert in scores.experts], dim=1).double()
    if scores.aligned_NK is not None:
        right_NK = torch.where(scores.aligned_NK, right_NK, base_N[:, None])
    expert_N = right_NK.gather(1, favourite_N[:, None])[:, 0]
    gain_N = (expert_N - base_N)[log_odds_N.argsort(descending=True)]
    needed_N, count = scores.weak_labels() > 0, len(base_N)
    greatest = min(2 * int(needed_N.sum()), count) or count
    # Right at rate m / N: those of the base, and what the first m tokens gain.
    right_M = base_N.sum() + torch.cat([torch.zeros(1, dtype=torch.float64), gain_N[:greatest].cumsum(0)])
    return Ranking(float(right_M.mean() / count), auroc(log_odds_N, needed_N), greatest / count)

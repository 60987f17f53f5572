"""Learning when an expert's token is to be taken back: what the base says once it has read on behind it.

A token is *disputed* where an expert writes something else than the base would have. What is learned is whether the
base's own token was right there, and the expert's therefore wrong. Where both are wrong, nothing is gained by taking
back, so these count as not regretted.

The value is a sum of two parts, learned together: a function of the base's step where it looks back, of the kinds that
gates have, which is computed on the device; and a linear one of :data:`engine.hindsight.NUMBERS`, which are known where
tokens are written. The regret is the sum's logistic function.

Shapes: P positions, I inputs of the first part, N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from engine.gates import KINDS
from engine.hindsight import NUMBERS
from training.auroc import auroc
from training.data import spread
from training.fit import Group, Plan, fit
from training.gate_only import Gate, Inputs, new_gate, scaling_of
from training.scoring import CHUNK, ModelScores, PairScores
from training.settings import GateSettings, RegretSettings
from training.tracking import Log, nothing

_NUMBERS = "numbers"
"""The second part's weights, among the first part's tensors."""


@dataclass(frozen=True)
class Disputes:
    """Gold tokens at which an expert writes something else than the base would, the text before them being gold.

    Attributes:
        row_P: their numbers among the gold tokens of a split.
        regretted_P: whether the base's own token is the gold one.
        weight_P: for how many each stands.
    """

    row_P: torch.Tensor
    regretted_P: torch.Tensor
    weight_P: torch.Tensor

    @classmethod
    def of(cls, scores: PairScores, gate: Gate, threshold: float, rows_N: torch.Tensor) -> Disputes:
        """All of a split, teacher-forced.

        Args:
            threshold: a token is deferred where its deferral probability is greater.
            rows_N: which of the gold tokens are looked at.
        """
        deferral_N, favourite_N = [], []
        for inputs_NI in scores.base.chunks(gate.features):
            deferral_N.append(gate.deferral(inputs_NI))
            favourite_N.append(gate.logits(inputs_NI).argmax(dim=1))
        top_NK = torch.stack([expert.top_N for expert in scores.experts], dim=1)
        expert_N = top_NK.gather(1, torch.cat(favourite_N)[:, None])[:, 0]
        disputed_N = rows_N & (torch.cat(deferral_N) > threshold) & (expert_N != scores.base.top_N)
        row_P = disputed_N.nonzero()[:, 0]
        regretted_P = scores.base.top_N[row_P] == scores.gold_N[row_P]
        return cls(row_P, regretted_P, torch.ones(len(row_P)))

    def some(self, limit: int) -> Disputes:
        """At most ``limit``: of both outcomes as many as there are, evenly spread; each stands for what it leaves out.

        So the mean over them, by weight, is that over all, and the rarer outcome is seen as often as can be.
        """
        if len(self.row_P) <= limit:
            return self
        by_outcome = [(self.regretted_P == outcome).nonzero()[:, 0].tolist() for outcome in (False, True)]
        rarer = min(len(numbers) for numbers in by_outcome)
        least = min(rarer, limit // 2)
        chosen: list[tuple[int, float]] = []
        for numbers in by_outcome:
            if numbers:
                kept = spread(numbers, least if len(numbers) == rarer else limit - least)
                chosen += [(number, len(numbers) / len(kept)) for number in kept]
        chosen.sort()
        place_P = torch.tensor([number for number, _ in chosen])
        weight_P = self.weight_P[place_P] * torch.tensor([weight for _, weight in chosen])
        return Disputes(self.row_P[place_P], self.regretted_P[place_P], weight_P)


@dataclass(frozen=True)
class Positions:
    """What is known of disputed tokens once the base has read on.

    Attributes:
        scores: the base's, of the step where it looks back.
        numbers_PN: of :data:`engine.hindsight.NUMBERS`.
        regretted_P: as in :class:`Disputes`, as is ``weight_P``.
    """

    scores: ModelScores
    numbers_PN: torch.Tensor
    regretted_P: torch.Tensor
    weight_P: torch.Tensor

    def __len__(self) -> int:
        return len(self.regretted_P)

    @property
    def both(self) -> bool:
        """Whether there is something to tell apart."""
        return bool(self.regretted_P.any()) and not bool(self.regretted_P.all())


@dataclass(frozen=True)
class Regret:
    """Both parts, for inputs as they are.

    Attributes:
        gate: the first part, with one value.
        numbers_N: the weights of the second.
        loss: on the held-out positions.
    """

    gate: Gate
    numbers_N: torch.Tensor
    loss: float = math.nan

    def values(self, positions: Positions) -> torch.Tensor:
        """Log-odds [P] of the regret."""
        parts = positions.scores.chunks(self.gate.features)
        return torch.cat([self.gate.logits(part_PI)[:, 0] for part_PI in parts]) + positions.numbers_PN @ self.numbers_N

    def auroc(self, positions: Positions) -> float | None:
        """How well it tells the regretted ones from the others."""
        return auroc(self.values(positions), positions.regretted_P)


def value(
    kind: str, tensors: Mapping[str, torch.Tensor], inputs_PI: torch.Tensor, numbers_PN: torch.Tensor
) -> torch.Tensor:
    """Log-odds [P] by the tensors of a kind of gate and the weights ``numbers``."""
    return KINDS[kind].logits(tensors, inputs_PI)[:, 0] + numbers_PN @ tensors[_NUMBERS]


def regret_loss(value_P: torch.Tensor, regretted_P: torch.Tensor, weight_P: torch.Tensor) -> torch.Tensor:
    """The log loss, summed by weight."""
    return binary_cross_entropy_with_logits(value_P, regretted_P.to(value_P.dtype), weight_P, reduction="sum")


def chance(positions: Positions) -> float:
    """The log loss of who knows only how often tokens are regretted: what a regret has to better."""
    weight_P = positions.weight_P
    share = float(weight_P[positions.regretted_P].sum() / weight_P.sum())
    return -sum(part * math.log(part) for part in (share, 1 - share) if part > 0)


def fit_regret(
    learned: Positions,
    held_out: Positions,
    settings: RegretSettings,
    seed: int,
    folder: Path,
    device: torch.device,
    log: Log = nothing,
) -> Regret:
    """The regret with the least loss on held-out positions, over all steps and starts.

    Args:
        folder: of checkpoints, of which none is written: a start takes seconds.

    Raises:
        DivergedError: the loss or a gradient is not finite.
    """
    # Of an "mlp" the hidden layer starts at random; a linear one starts, and ends, always alike.
    starts = settings.starts if KINDS[settings.kind].hidden else 1
    fitting = _Fit(learned, held_out, settings, device)
    found = []
    for start in range(starts):
        found.append(fitting.run(starts * seed + start, folder, _behind(log, start * settings.steps)))
    return min(found, key=lambda regret: regret.loss)


def _behind(log: Log, steps: int) -> Log:
    """The log of a start that comes after so many steps of others."""

    def behind(step: int, values: Mapping[str, float]) -> None:
        log(steps + step, values)

    return behind


class _Fit:
    """Both sets of positions, scaled by the learned ones."""

    def __init__(self, learned: Positions, held_out: Positions, settings: RegretSettings, device: torch.device) -> None:
        self._settings, self._learned, self._device = settings, learned, device
        self._shape = GateSettings(kind=settings.kind, width=settings.width, features=settings.features)
        self._scaling = scaling_of(self._shape, learned.scores, bias=True)
        self._mean_N = learned.numbers_PN.mean(dim=0)
        spread_N = learned.numbers_PN.std(dim=0, correction=0)
        # A number that never changes tells nothing; it stays as it is.
        self._scale_N = torch.where(spread_N < 1e-6, 1.0, spread_N)
        self._sets = [
            (positions, Inputs(positions.scores, settings.features, self._scaling, device))
            for positions in (learned, held_out)
        ]

    def run(self, seed: int, folder: Path, log: Log) -> Regret:
        settings, scaling = self._settings, self._scaling
        start = scaling.into(new_gate(self._shape, self._learned.scores, 1, seed, bias=True))
        start[_NUMBERS] = torch.zeros(len(NUMBERS))
        tensors = {name: torch.nn.Parameter(tensor.clone().to(self._device)) for name, tensor in start.items()}
        least, kept = math.inf, start

        def keep(_step: int) -> bool:
            nonlocal least, kept
            with torch.no_grad():
                loss = float(sum(self._losses(tensors, held_out=True)))
            if loss < least:
                least, kept = loss, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            return False

        plan = Plan(settings.steps, 0.0, settings.steps, log)
        group = Group(tensors, settings.learning_rate, settings.weight_decay)
        fit([group], lambda _: self._losses(tensors, held_out=False), plan, folder, "regret", keep)
        keep(settings.steps)
        # What is scaled is folded into weights and bias.
        numbers_N = kept.pop(_NUMBERS) / self._scale_N
        kept["bias"] = kept["bias"] - numbers_N @ self._mean_N
        return Regret(scaling.out_of(kept, self._shape), numbers_N, least)

    def _losses(self, tensors: Mapping[str, torch.Tensor], *, held_out: bool) -> Iterator[torch.Tensor]:
        """The parts of the mean loss of a set."""
        positions, inputs = self._sets[held_out]
        total = float(positions.weight_P.sum())
        for first in range(0, len(positions), CHUNK):
            rows = slice(first, first + CHUNK)
            numbers_PN = (positions.numbers_PN[rows] - self._mean_N) / self._scale_N
            value_P = value(self._settings.kind, tensors, inputs(rows), numbers_PN.to(self._device))
            regretted_P, weight_P = (
                each[rows].to(self._device) for each in (positions.regretted_P, positions.weight_P)
            )
            yield regret_loss(value_P, regretted_P, weight_P) / total

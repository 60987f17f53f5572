"""Thresholds: from a deferral rate to a threshold, and from a sweep of measured points to the one that is served.

Calibration looks for gates' thresholds among log-odds, which do not saturate as probabilities do: a real gate's
probabilities crowd at 0 and 1. Any other scale will do, such as the one of the confidence policy: see ``Bounds``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from engine import odds


@dataclass(frozen=True)
class Bounds:
    """The ends of a scale of thresholds.

    Attributes:
        least, greatest: between them thresholds are looked for.
        always, never: the thresholds that every value is above, and that none is above, whatever rounding does.
    """

    least: float
    greatest: float
    always: float
    never: float


PROBABILITIES = Bounds(0.0, 1.0, -1.0, 1.0)
LOG_ODDS = Bounds(-36.0, 36.0, -math.inf, math.inf)
"""Beyond 36 a probability in double precision is 1."""


def probability(log_odds: float) -> float:
    """A threshold's log-odds as the probability that the engine compares with: 1 for ``never``, -1 for ``always``."""
    if math.isinf(log_odds):
        return 1.0 if log_odds > 0 else -1.0
    return odds.probability(log_odds)


def log_odds(threshold: float) -> float:
    """``probability`` undone: 1 and more is ``never``, less than 0 ``always``; 0 is the least of ``LOG_ODDS``."""
    if threshold >= 1:
        return math.inf
    return -math.inf if threshold < 0 else max(LOG_ODDS.least, odds.log_odds(threshold or 1e-300))


@dataclass(frozen=True)
class Point:
    """What decoding with one threshold measured.

    Attributes:
        nominal_rate: share of the gold tokens with a greater deferral value, teacher-forced.
        threshold: on the scale of the caller's ``Bounds``.
        score: share of right answers.
        deferral_rate: expert tokens / completion tokens.
        right: of each question whether its answer is right, if that is known.
    """

    nominal_rate: float
    threshold: float
    score: float
    deferral_rate: float
    right: tuple[bool, ...] = field(default=(), kw_only=True)


P = TypeVar("P", bound=Point)


def quantile(observed_N: torch.Tensor, rate: float, bounds: Bounds = PROBABILITIES) -> float:
    """A threshold that a share ``rate`` of the observed values exceed; of 0 and 1 ``bounds``' never and always."""
    if rate <= 0 or rate >= 1:
        return bounds.never if rate <= 0 else bounds.always
    # numpy's method "linear", as torch's own, which refuses more than 2**24 values.
    ordered_N = observed_N.double().sort().values
    place = (1 - rate) * (len(ordered_N) - 1)
    low, share = int(place), place - int(place)
    high = min(low + 1, len(ordered_N) - 1)
    return _clipped(float((1 - share) * ordered_N[low] + share * ordered_N[high]), bounds)


def ends(observed_N: torch.Tensor, bounds: Bounds = PROBABILITIES) -> tuple[float, float]:
    """The greatest and the least observed value as thresholds: nothing is above the one, all else above the other."""
    return _clipped(float(observed_N.max()), bounds), _clipped(float(observed_N.min()), bounds)


def _clipped(threshold: float, bounds: Bounds) -> float:
    return min(bounds.greatest, max(bounds.least, threshold))


def refine(points: Sequence[P], rounds: int, decode: Callable[[float], P]) -> list[P]:
    """The points, and in each round two more: halfway, in nominal rate, from the best point to its neighbours.

    A gate that is sure of itself has few probabilities between those of tokens that it defers and those of others, so
    that the rates of a sweep may jump over the best thresholds.

    Args:
        decode: measures a nominal rate.
    """
    found = sorted(points, key=lambda point: point.nominal_rate)
    for _ in range(rounds):
        best = max(range(len(found)), key=lambda i: found[i].score)
        around = [found[i].nominal_rate for i in range(max(0, best - 1), min(len(found), best + 2))]
        rates = [(low + high) / 2 for low, high in itertools.pairwise(around)]
        found = sorted([*found, *map(decode, rates)], key=lambda point: point.nominal_rate)
    return found


def choose(
    points: Sequence[P],
    observed_N: torch.Tensor,
    decode: Callable[[float], P],
    *,
    noise: float = 0.0,
    bounds: Bounds = PROBABILITIES,
) -> P:
    """The cheapest of the points that score best, moved away from observed values only if that costs nothing.

    Points are as good as the best where their scores are below it by no more than their own noise (``within_noise``);
    cheapest is the lowest deferral rate, since the experts' tokens cost more than the base's. (This is the
    one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, with cost for complexity.)

    A threshold just beside an observed value lets rounding decide. So the middle of the widest gap between observed
    values is tried: between the two around the chosen point, or, without noise, within the longest run of neighbouring
    points that all have the best score. It is decoded once, and taken only if it scores no less.

    Args:
        points: what the sweep measured.
        observed_N: deferral values [N] on the validation text.
        decode: measures a threshold.
        noise: standard errors; 0 takes scores as they are.
    """
    ordered = sorted(points, key=lambda point: point.threshold)
    best = max(points, key=lambda point: (point.score, -point.deferral_rate))
    if noise > 0:
        good = [point for point in ordered if within_noise(point, best, noise)]
        cheapest = min(good, key=lambda point: (point.deferral_rate, -point.score))
        tried = decode(_safest(cheapest.threshold, cheapest.threshold, observed_N, bounds))
        return tried if tried.score >= cheapest.score else cheapest
    runs: list[list[P]] = [[]]
    for point in ordered:
        if point.score == best.score:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    run = max(runs, key=len)
    tried = decode(_safest(run[0].threshold, run[-1].threshold, observed_N, bounds))
    return tried if tried.score >= best.score else min(run, key=lambda point: point.deferral_rate)


def within_noise(point: Point, best: Point, noise: float) -> bool:
    """Whether a score is below the best by at most ``noise`` standard errors of the paired difference."""
    if point.score >= best.score:
        return True
    if not point.right or len(point.right) != len(best.right):
        return False
    count = len(best.right)
    differences = [int(b) - int(p) for b, p in zip(best.right, point.right, strict=True)]
    mean = sum(differences) / count
    variance = sum((difference - mean) ** 2 for difference in differences) / max(1, count - 1)
    # A hair more: one question of n is exactly one standard error.
    return mean <= noise * math.sqrt(variance / count) * (1 + 1e-9)


def _safest(low: float, high: float, observed_N: torch.Tensor, bounds: Bounds) -> float:
    """The middle of the widest gap between observed values in [low, high]; of the gap around them if equal."""
    low, high = _clipped(low, bounds), _clipped(high, bounds)
    observed_N = observed_N.double()
    if low == high:
        below_N, above_N = observed_N[observed_N <= low], observed_N[observed_N > low]
        low = float(below_N.max()) if len(below_N) else bounds.least
        high = float(above_N.min()) if len(above_N) else bounds.greatest
        low, high = _clipped(low, bounds), _clipped(high, bounds)
    inside_N = observed_N[(observed_N > low) & (observed_N < high)]
    edges = torch.cat([torch.tensor([low]), inside_N.sort().values, torch.tensor([high])])
    widest = int(edges.diff().argmax())
    return float((edges[widest] + edges[widest + 1]) / 2)


_ATTEMPTS = 4
_NEAR = 0.005


def reach(points: Sequence[P], target_rate: float, decode: Callable[[float], P], bounds: Bounds = PROBABILITIES) -> P:
    """The point whose measured deferral rate is nearest to ``target_rate``.

    A few more thresholds are decoded for it, each ``interpolate``'s between those that are there.
    """
    found = list(points)
    for _ in range(_ATTEMPTS):
        threshold = interpolate(found, target_rate, bounds)
        if any(point.threshold == threshold for point in found):
            break
        found.append(decode(threshold))
        if abs(found[-1].deferral_rate - target_rate) <= _NEAR:
            break
    return min(reversed(found), key=lambda point: abs(point.deferral_rate - target_rate))


def interpolate(points: Sequence[Point], target_rate: float, bounds: Bounds = PROBABILITIES) -> float:
    """The threshold whose measured rate is ``target_rate``, linear between measured points."""
    ordered = sorted(points, key=lambda point: (point.deferral_rate, -point.threshold))
    below = [point for point in ordered if point.deferral_rate <= target_rate]
    above = [point for point in ordered if point.deferral_rate >= target_rate]
    if not below or not above:
        nearest = (below or above)[-1 if below else 0]
        return _clipped(nearest.threshold, bounds)
    low, high = below[-1], above[0]
    ends = [_clipped(point.threshold, bounds) for point in (low, high)]
    span = high.deferral_rate - low.deferral_rate
    share = 0.0 if span == 0 else (target_rate - low.deferral_rate) / span
    return ends[0] + share * (ends[1] - ends[0])


def remarks(swept: Sequence[Point], points: Sequence[Point]) -> list[str]:
    """What a user should know of the sweep over nominal rates, and of all points: rates that cannot be had."""
    found = []
    distinct = len({point.threshold for point in swept})
    if distinct < len(swept):
        found.append(
            f"{len(swept)} nominal rates have {distinct} thresholds: the gate has the same value for many tokens"
        )
    rates = sorted({point.deferral_rate for point in points})
    low, high = max(itertools.pairwise([0.0, *rates]), key=lambda pair: pair[1] - pair[0])
    if high - low > _HOLE:
        found.append(f"no measured deferral rate is between {low:.2f} and {high:.2f}")
    return found


_HOLE = 0.25
"""A greater step between neighbouring measured rates is worth a remark."""

"""Thresholds: from a deferral rate to a threshold, and from a sweep of measured points to the one that is served."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Point:
    """What decoding with one threshold measured.

    Attributes:
        nominal_rate: share of the gold tokens with a greater deferral probability, teacher-forced.
        threshold: 0 to 1; or 1 for the base alone and -1 for the experts alone.
        score: share of right answers.
        deferral_rate: expert tokens / completion tokens.
    """

    nominal_rate: float
    threshold: float
    score: float
    deferral_rate: float


P = TypeVar("P", bound=Point)


def quantile(observed_N: torch.Tensor, rate: float) -> float:
    """A threshold that a share ``rate`` of the observed probabilities exceed.

    Of 0 and 1 the thresholds that no probability reaches, whatever rounding does: 1 and -1.
    """
    if rate <= 0 or rate >= 1:
        return 1.0 if rate <= 0 else -1.0
    # numpy's method "linear", as torch's own, which refuses more than 2**24 values.
    ordered_N = observed_N.double().sort().values
    place = (1 - rate) * (len(ordered_N) - 1)
    low, share = int(place), place - int(place)
    high = min(low + 1, len(ordered_N) - 1)
    return float((1 - share) * ordered_N[low] + share * ordered_N[high])


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


def choose(points: Sequence[P], observed_N: torch.Tensor, decode: Callable[[float], P]) -> P:
    """The point of the best score, moved away from observed probabilities only if that costs nothing.

    A threshold just beside an observed probability lets rounding decide. So the middle of the widest gap between
    observed probabilities is tried: within the longest run of neighbouring points that all have the best score, or,
    if the best is a point alone, between the two probabilities around it. It is decoded once, and taken only if it
    scores no less than the best point.

    Args:
        points: what the sweep measured.
        observed_N: deferral probabilities [N] on the validation text.
        decode: measures a threshold in [0, 1].
    """
    ordered = sorted(points, key=lambda point: point.threshold)
    best = max(point.score for point in points)
    runs: list[list[P]] = [[]]
    for point in ordered:
        if point.score == best:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    run = max(runs, key=len)
    tried = decode(_safest(run[0].threshold, run[-1].threshold, observed_N))
    # The experts' tokens cost more than the base's.
    cheapest = min(run, key=lambda point: point.deferral_rate)
    return tried if tried.score >= best else cheapest


def _safest(low: float, high: float, observed_N: torch.Tensor) -> float:
    """The middle of the widest gap between observed probabilities in [low, high]; of the gap around them if equal."""
    low, high = (min(1.0, max(0.0, bound)) for bound in (low, high))
    observed_N = observed_N.double()
    if low == high:
        below_N, above_N = observed_N[observed_N <= low], observed_N[observed_N > low]
        low = float(below_N.max()) if len(below_N) else 0.0
        high = float(above_N.min()) if len(above_N) else 1.0
    inside_N = observed_N[(observed_N > low) & (observed_N < high)]
    edges = torch.cat([torch.tensor([low]), inside_N.sort().values, torch.tensor([high])])
    widest = int(edges.diff().argmax())
    return float((edges[widest] + edges[widest + 1]) / 2)


def reach(points: Sequence[P], target_rate: float, decode: Callable[[float], P]) -> P:
    """The point whose measured deferral rate is nearest to ``target_rate``.

    One more threshold is decoded for it, ``interpolate``'s.
    """
    tried = decode(interpolate(points, target_rate))
    return min([tried, *points], key=lambda point: abs(point.deferral_rate - target_rate))


def interpolate(points: Sequence[Point], target_rate: float) -> float:
    """The threshold in [0, 1] whose measured rate is ``target_rate``, linear between measured points."""
    ordered = sorted(points, key=lambda point: point.deferral_rate)
    below = [point for point in ordered if point.deferral_rate <= target_rate]
    above = [point for point in ordered if point.deferral_rate >= target_rate]
    if not below or not above:
        nearest = (below or above)[-1 if below else 0]
        return min(1.0, max(0.0, nearest.threshold))
    low, high = below[-1], above[0]
    bounds = [min(1.0, max(0.0, point.threshold)) for point in (low, high)]
    span = high.deferral_rate - low.deferral_rate
    share = 0.0 if span == 0 else (target_rate - low.deferral_rate) / span
    return bounds[0] + share * (bounds[1] - bounds[0])

"""Choosing the threshold: decode at quantiles of the gate's probabilities and keep the curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Point:
    """One threshold of the sweep.

    ``nominal_rate`` is the share of gold tokens with a greater probability; ``deferral_rate`` is
    what decoding measured; ``score`` is the share of right answers.
    """

    nominal_rate: float
    threshold: float
    score: float
    deferral_rate: float


def sweep(
    probabilities_N: torch.Tensor,
    decode: Callable[[float], tuple[float, float]],
    rates: Sequence[float],
) -> list[Point]:
    """Decode at the quantile thresholds that defer ``rates`` of the gold tokens.

    ``decode`` takes a threshold and returns the score and the deferral rate on the validation set.
    """
    points = []
    for rate in tqdm(rates, desc="calibrate", unit="threshold"):
        threshold = _quantile_threshold(probabilities_N, rate)
        score, measured = decode(threshold)
        points.append(Point(rate, threshold, score, measured))
    return points


def _quantile_threshold(probabilities_N: torch.Tensor, rate: float) -> float:
    """A threshold that ``rate`` of the probabilities exceed; 1 for none, -1 for all."""
    if rate <= 0 or rate >= 1:
        return 1.0 if rate <= 0 else -1.0
    return float(torch.quantile(probabilities_N, 1 - rate))


def choose(points: Sequence[Point], probabilities_N: torch.Tensor) -> float:
    """The default threshold: of those about as good as the best, the one safest from rounding.

    The points of the best score span a range of thresholds (a single one spans up to its two
    neighbours); the threshold is the middle of the widest gap between observed probabilities
    in it, so that small numerical differences flip no decision.
    """
    ordered = sorted(points, key=lambda p: p.threshold)
    best = max(p.score for p in points)
    at = [i for i, p in enumerate(ordered) if p.score == best]
    low, high = at[0], at[-1]
    if low == high:
        low, high = max(0, low - 1), min(len(ordered) - 1, high + 1)
    bounds = torch.tensor([ordered[low].threshold, ordered[high].threshold]).clamp(0, 1)
    inside = probabilities_N[(probabilities_N > bounds[0]) & (probabilities_N < bounds[1])]
    edges = torch.cat([bounds, inside]).sort().values
    widest = int(edges.diff().argmax())
    return float((edges[widest] + edges[widest + 1]) / 2)


def curve(points: Sequence[Point]) -> list[dict[str, float]]:
    """The points as the gate artifact keeps them."""
    return [asdict(p) for p in points]

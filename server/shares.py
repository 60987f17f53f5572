"""Thresholds by the share of tokens that experts write, or by what they cost, from a gate's calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

_EDGE = 1e-9
"""Probabilities nearer than this to 0 and 1 are taken for it, where log-odds are asked for."""

Curve = Sequence[tuple[float, float]]
"""Points (threshold, what was measured at it): the share of the tokens that experts wrote, or their seconds."""


def threshold_of(share: float, curve: Curve) -> float:
    """The threshold at which experts write about so many of the tokens.

    Between two points of the curve it is interpolated in log-odds, since gates put most of their probabilities near 0
    and 1. A share of 0 is the threshold 1, a share of 1 the threshold 0, whatever the curve.

    Args:
        share: 0 to 1.
        curve: in any order, at least one point.
    """
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    points = sorted([(0.0, 1.0), *((rate, min(max(at, 0.0), 1.0)) for at, rate in curve), (1.0, 0.0)])
    below = max(point for point in points if point[0] <= share)
    above = min((point for point in points if point[0] > share), key=lambda point: (point[0], -point[1]))
    return _between(share, below, above)


def threshold_within(cost: float, curve: Curve) -> float:
    """The lowest threshold at which experts took at most so long, on average.

    Where a lower threshold was measured to cost less, which is noise, the higher cost holds. Between two points it is
    interpolated as in :func:`threshold_of`. A cost of 0 is the threshold 1; what costs more than all points is the
    lowest of their thresholds.

    Args:
        cost: 0 or more, in the curve's unit.
        curve: in any order, at least one point.
    """
    if cost <= 0.0:
        return 1.0
    below = (0.0, 1.0)
    for at, seconds in sorted(curve, reverse=True):
        point = (max(seconds, below[0]), min(max(at, 0.0), 1.0))
        if point[0] > cost:
            return _between(cost, below, point)
        below = point
    return below[1]


def _between(value: float, below: tuple[float, float], above: tuple[float, float]) -> float:
    """The threshold at a value, between two points (value, threshold)."""
    part = (value - below[0]) / (above[0] - below[0])
    if part == 0.0:
        return below[1]
    return _probability((1.0 - part) * _log_odds(below[1]) + part * _log_odds(above[1]))


def _log_odds(probability: float) -> float:
    inside = min(max(probability, _EDGE), 1.0 - _EDGE)
    return math.log(inside) - math.log1p(-inside)


def _probability(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))

"""Thresholds by the share of tokens that experts write, or by what they cost, from a gate's calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.odds import log_odds, probability

Curve = Sequence[tuple[float, float]]
"""Points (threshold, what was measured at it): the share of the tokens that experts wrote, or their seconds."""

_LEAST = 1e-3
"""A share that was measured to be nearer to 0 or 1 counts as this: it is of finitely many tokens."""
_APART = math.log(1.5)


def threshold_of(share: float, curve: Curve) -> float:
    """The threshold at which experts write about so many of the tokens.

    Log-odds of the threshold go with log-odds of the share, in straight lines from point to point: gates put most of
    their probabilities near 0 and 1, and few beyond any threshold there, as if the tails were exponential. The first
    and the last line go on beyond the points, for curves whose ends were not measured: calibrations of before they
    were. A share of 0 is the threshold 1, a share of 1 the threshold 0, whatever the curve.

    Args:
        share: 0 to 1.
        curve: in any order. Where a lower threshold was measured to defer less, which is noise, the greater share
            holds. Thresholds that no probability passes, or all do, say nothing of the gate.
    """
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    points: list[tuple[float, float]] = []
    greatest = _LEAST
    for at, measured in sorted(curve, reverse=True):
        if 0.0 < at < 1.0:
            greatest = max(greatest, min(measured, 1.0 - _LEAST))
            points.append((log_odds(greatest), log_odds(at)))
    return probability(_on_lines(log_odds(share), points))


def threshold_within(cost: float, curve: Curve) -> float:
    """The lowest threshold at which experts took at most so long, on average.

    It is found as in :func:`threshold_of`, with the part of the greatest cost for the share. A cost of 0 is the
    threshold 1; what costs as much as all points is the lowest of their thresholds.

    Args:
        cost: 0 or more, in the curve's unit.
        curve: in any order, at least one point.
    """
    if cost <= 0.0:
        return 1.0
    lowest = min(min(max(at, 0.0), 1.0) for at, _ in curve)
    greatest = max(seconds for _, seconds in curve)
    if cost >= greatest:
        return lowest
    return max(lowest, threshold_of(cost / greatest, [(at, seconds / greatest) for at, seconds in curve]))


def _on_lines(x: float, points: list[tuple[float, float]]) -> float:
    """The value at x of the lines through points (x, y), of which x rises and y falls; no points: -x."""
    if not points:
        return -x
    if x < points[0][0]:
        return _beyond(x, points)
    if x >= points[-1][0]:
        return -_beyond(-x, [(-at, -value) for at, value in reversed(points)])
    above = next(number for number, (at, _) in enumerate(points) if at > x)
    (x1, y1), (x2, y2) = points[above - 1], points[above]
    return y1 + (x - x1) / (x2 - x1) * (y2 - y1)


def _beyond(x: float, points: list[tuple[float, float]]) -> float:
    """The line before the first point: to the first other one of at least half as much more odds, as those that are
    nearer may differ by noise; of slope -1 where there is none.
    """
    x1, y1 = points[0]
    far = [(at, value) for at, value in points if at >= x1 + _APART]
    slope = (far[0][1] - y1) / (far[0][0] - x1) if far else -1.0
    return y1 + slope * (x - x1)

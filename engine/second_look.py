"""Which tokens of an answer deserve a second look."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.types import BASE, BLEND, Look

CHECK_BELOW = 0.7
"""Default of the confidence below which a token deserves a second look: chosen on the demo pair's validation questions,
see ``training/demo/second_looks.py``."""


def confidence(source: int, look: Look, support: Sequence[float] | None = None) -> float | None:
    """How sure of a token whoever wrote it was; None if that is not known.

    Args:
        source: the lane that wrote it, or BLEND.
        support: of what several members wrote together, its log-probability with each of them: the surest counts.
    """
    if support is not None:
        return max((math.exp(value) for value in support if not math.isnan(value)), default=None)
    if source == BLEND:
        return None
    return look.base if source == BASE and look.base is not None else look.expert


def deserves_check(
    source: int,
    look: Look,
    support: Sequence[float] | None = None,
    *,
    doubted: bool = False,
    below: float = CHECK_BELOW,
) -> bool:
    """Whether a token deserves a second look: an expert would have written another, or who wrote it was not sure.

    Args:
        doubted: it is the base's own, and an expert stood back or was taken back for it.
        below: of the confidence.
    """
    sure = confidence(source, look, support)
    return doubted or (sure is not None and sure < below)

"""What a choice's time was spent on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.types import BASE

MAX_STRETCHES = 128
"""Most spans below that of a choice; what is more is merged."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a choice's life, in seconds of the machine's monotonic clock.

    Attributes:
        name: "queue", "base", "expert" (the steps of an expert that is served alone), "expert wait", or
            "base and experts" where several are merged.
        lane: number of the lane that wrote, if it is known.
        tokens: how many it wrote meanwhile; None where that says nothing.
    """

    name: str
    start: float
    end: float
    lane: int | None = None
    tokens: int | None = None


def stretches(
    timeline: Sequence[float],
    sources: Sequence[int],
    *,
    primary_lane: int,
    begun: float,
    ended: float,
    finished: bool,
) -> list[Stretch]:
    """What a choice's time was spent on, in order and without gaps.

    Args:
        timeline: as in :class:`~engine.types.Delta`.
        sources: who wrote each token.
        primary_lane: the lane that writes what is not deferred.
        begun: when the request was submitted.
        ended: when its last token was seen.
        finished: it was not cut short: the last token is the end of its last step.
    """
    if not timeline:
        return [Stretch("queue", begun, ended)]
    writers: list[int] = []
    runs = [0]
    for source in sources:
        if source == primary_lane:
            runs[-1] += 1
        else:
            writers.append(source)
            runs.append(0)
    own = "base" if primary_lane == BASE else "expert"
    found = [Stretch("queue", begun, timeline[0])]
    since = timeline[0]
    came: Sequence[float] = timeline[2::2]
    for number, parked in enumerate(timeline[1::2]):
        found.append(Stretch(own, since, parked, primary_lane, runs[number] if number < len(runs) else None))
        since = came[number] if number < len(came) else ended
        writer = writers[number] if number < len(writers) else None
        found.append(Stretch("expert wait", parked, since, writer, None if writer is None else 1))
    parked_still = len(timeline) % 2 == 0
    if not parked_still and not (finished and sources and sources[-1] != primary_lane):
        found.append(Stretch(own, since, ended, primary_lane, runs[-1]))
    return found


def merged(found: Sequence[Stretch], limit: int = MAX_STRETCHES) -> list[Stretch]:
    """At most ``limit`` stretches for all of the choice's life, without gaps.

    A run of tokens of one expert becomes one: the base's looks in between, which wrote nothing, are part of it. Where
    that does not suffice, so many neighbours become one as have to.

    Args:
        found: from :func:`stretches`.
    """
    runs: list[Stretch] = []
    for stretch in found:
        if (
            len(runs) > 1
            and stretch.name == runs[-2].name == "expert wait"
            and stretch.lane == runs[-2].lane
            and runs[-1].tokens == 0
        ):
            runs.pop()
            runs[-1] = replace(runs[-1], end=stretch.end, tokens=_sum(runs[-1], stretch))
        else:
            runs.append(stretch)
    queue, life = runs[:1], runs[1:]
    size = math.ceil(len(life) / (limit - 1))
    if size <= 1:
        return runs
    groups = [life[first : first + size] for first in range(0, len(life), size)]
    return queue + [
        Stretch("base and experts", group[0].start, group[-1].end, tokens=_sum(*group)) if len(group) > 1 else group[0]
        for group in groups
    ]


def _sum(*stretches: Stretch) -> int:
    return sum(stretch.tokens or 0 for stretch in stretches)

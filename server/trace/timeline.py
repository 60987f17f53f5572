"""What a choice's time was spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.types import BASE

MAX_STRETCHES = 128
"""Most spans below that of a choice; the number of further ones stands in the choice's span."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a choice's life, in seconds of the machine's monotonic clock.

    Attributes:
        name: "queue", "base", "expert" (the steps of an expert that is served alone) or "expert wait".
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

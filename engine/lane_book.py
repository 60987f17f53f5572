"""What the scheduler knows of one lane."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.strategies.base import Decoding


@dataclass(slots=True)
class LaneBook:
    """One lane's side of all running requests.

    Attributes:
        due: requests that the lane must be told about, in the order in which they became due.
        told: what was due when it was told last.
        holds: ids of requests that it has been told of and not yet told to remove.
        removals: ids that it must be told to remove.
        parked: requests that wait for its word, the longest waiting first.
        started: how many running requests start with it.
        lost: a step of it is overdue.
    """

    due: dict[str, Decoding] = field(default_factory=dict)
    told: dict[str, Decoding] = field(default_factory=dict)
    holds: set[str] = field(default_factory=set)
    removals: list[str] = field(default_factory=list)
    parked: dict[Decoding, None] = field(default_factory=dict)
    started: int = 0
    lost: bool = False

    def end(self, request_id: str, decoding: Decoding) -> None:
        """Forget a request that has ended."""
        self.due.pop(request_id, None)
        self.told.pop(request_id, None)
        self.parked.pop(decoding, None)
        if request_id in self.holds:
            self.holds.remove(request_id)
            self.removals.append(request_id)

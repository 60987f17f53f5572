"""Which row gives up its KV memory, while it is parked, for a request that waits."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.request import Request


class Speed:
    """Seconds per token where a step computes many: least squares through the origin, with a fading past.

    Long prompts decide, as they should: what is asked is how long it takes to compute a whole text again.
    """

    _MEMORY = 0.98

    def __init__(self) -> None:
        self._tokens_seconds = self._tokens_squared = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in one step."""
        self._tokens_seconds = self._tokens_seconds * self._MEMORY + tokens * seconds
        self._tokens_squared = self._tokens_squared * self._MEMORY + tokens * tokens

    @property
    def seconds_per_token(self) -> float:
        """0 before the first step."""
        return self._tokens_seconds / self._tokens_squared if self._tokens_squared else 0.0


def idle_row(parked: Iterable[tuple[Request, float]], seconds_per_token: float, held: int) -> Request | None:
    """The first row that has been parked for so long that computing it again would have cost less.

    Waiting costs the one request that waits; to compute a row again takes the lane from all. So a row is given up once
    it has been parked for as many times as long as that takes as there are rows: whenever it goes on after that, both
    together have cost at most twice what the better of the two would have (the ski rental problem: Karlin et al.,
    Competitive Snoopy Caching, 1988). A row that goes on every few steps is never given up.

    Args:
        parked: rows, each with the seconds for which it has been parked; the longest parked first.
        held: how many rows the lane holds.
    """
    for request, seconds in parked:
        if seconds >= held * request.num_tokens * seconds_per_token:
            return request
    return None

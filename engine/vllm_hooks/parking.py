"""Which row gives up its KV memory, while it is parked, for a request that waits."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.request import Request


class Speed:
    """How long a token takes where a step computes many of them: how fast a whole text would be computed again.

    Steps count by the square of their tokens, against the largest step so far. So a lane that has computed no prompt
    for a while still knows how long one takes, and is not misled by steps of a few rows, whose tokens are dear.
    """

    _SHARE = 0.3
    """Of what is known, that one more of the largest steps replaces."""

    def __init__(self) -> None:
        self.seconds_per_token = 0.0
        """0 before the first step."""
        self._most = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in one step."""
        if not tokens:
            return
        if tokens > self._most:
            share = max(self._SHARE, 1.0 - (self._most / tokens) ** 2)
            self._most = tokens
        else:
            share = self._SHARE * (tokens / self._most) ** 2
        self.seconds_per_token += (seconds / tokens - self.seconds_per_token) * share


def idle_row(parked: Iterable[tuple[Request, float]], seconds_per_token: float, held: int) -> Request | None:
    """The first row that has been parked for so long that computing it again would have cost less.

    Waiting costs the one request that waits; to compute a row again takes the lane from all that have rows there. So a
    row is given up once it has been parked for as many times as long as that takes as there are rows: whenever it goes
    on after that, both together have cost at most twice what the better of the two would have (the ski rental problem:
    Karlin et al., Competitive Snoopy Caching, 1988). A row that goes on every few steps is never given up.

    Args:
        parked: rows, each with the seconds for which it has been parked; the longest parked first.
        held: how many rows the lane holds.
    """
    for request, seconds in parked:
        if seconds >= held * request.num_tokens * seconds_per_token:
            return request
    return None

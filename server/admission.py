"""How much work the server takes on at once, and from whom."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.types import Collaboration, Delta
from server.errors import invalid, overloaded
from server.text.pieces import Piece

_RECENT = 64
"""Answered requests that the pace is taken from."""

_LONGEST_WAIT_S = 60
"""Clients are sent away for no longer: nobody knows the load of the minute after, and OpenAI's SDKs ignore more."""


class Places:
    """What one request holds, one per choice, of which it is an observer. All are given back at once, at its end.

    Args:
        on_end: called for each choice that ends before.
    """

    def __init__(self, count: int, on_end: Callable[[], None]) -> None:
        self.unfinished = count
        self._on_end = on_end

    def begun(self) -> None:
        """See :class:`~server.choice.ChoiceObserver`."""

    def accepted(self, collaboration: Collaboration) -> None:
        """See :class:`~server.choice.ChoiceObserver`."""

    def wrote(self, piece: Piece) -> None:
        """See :class:`~server.choice.ChoiceObserver`."""

    def ended(self, last: Delta | None, failure: Exception | None) -> None:
        """Nothing more is written of one of the choices; its place is kept until the response is complete."""
        self.unfinished -= 1
        self._on_end()


class Admission:
    """Counts generation requests (one per choice) that are somewhere between arrival and answer.

    What is beyond ``running`` waits, in the engine's queue. That queue is bounded here, where a client can still be
    told to come back later, and not in the engine.

    One client alone may fill the queue. So that this keeps nobody else out, there is a reserve beyond it: a client
    may take places there for as long as it holds no more than are left free. That is the dynamic threshold of shared
    switch buffers (Choudhury and Hahne, 1998): each newcomer takes at most half of what the one before it left, so
    that there is always room for one more client.

    Args:
        running: generation requests that the engine runs at once.
        queued: generation requests that may wait.
        reserve: places beyond those, for clients that hold few.
        retry_after: seconds; the minimum that rejected clients are told to wait.
        clock: seconds; a parameter for tests.

    Attributes:
        in_flight: places that are held.
        unfinished: those of them whose choice has not ended.
    """

    def __init__(
        self, running: int, queued: int, reserve: int, retry_after: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.capacity = running + queued
        self.in_flight = 0
        self.unfinished = 0
        self._reserve = reserve
        self._retry_after = retry_after
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._released: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def reserve(self, client: str, choices: int, param: str) -> Iterator[Places]:
        """Hold places for a request's choices while it is served.

        Args:
            client: the client that sent the request.
            choices: generation requests.
            param: the field to blame when they could never be admitted.

        Raises:
            ApiError: 429 if there is no room now; 400 if there never is.
        """
        if choices > self.capacity:
            raise invalid(
                f"The request asks for {choices} generations; this server takes at most {self.capacity} at once.", param
            )
        if (missing := self._missing(client, choices)) > 0:
            raise overloaded("Too many requests are waiting; try again later.", self._wait(missing))
        self.in_flight += choices
        self.unfinished += choices
        self._held[client] += choices
        self._empty.clear()
        places = Places(choices, self._end_one)
        try:
            yield places
        finally:
            self.in_flight -= choices
            self.unfinished -= places.unfinished
            self._held[client] -= choices
            if not self._held[client]:
                del self._held[client]
            self._released.append((self._clock(), choices))
            if not self.in_flight:
                self._empty.set()

    async def drained(self) -> None:
        """Returns when nothing is in flight."""
        await self._empty.wait()

    def _end_one(self) -> None:
        self.unfinished -= 1

    def _missing(self, client: str, choices: int) -> int:
        """How many places others must give back before this client gets so many; none if not positive."""
        in_queue = self.in_flight + choices - self.capacity
        in_reserve = self._held[client] + choices - (self.capacity + self._reserve - self.in_flight)
        return min(in_queue, in_reserve)

    def _wait(self, places: int) -> int:
        """Seconds until so many places are free, estimated from recent throughput."""
        if len(self._released) < 2:
            return self._retry_after
        (begin, _), *later = self._released
        pace = sum(choices for _, choices in later) / max(self._clock() - begin, 1e-3)
        return max(self._retry_after, min(math.ceil(places / pace), _LONGEST_WAIT_S))

"""How much work the server takes on at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import invalid, overloaded


class Admission:
    """Counts generation requests (one a choice) that are somewhere between arrival and answer.

    What is beyond ``running`` waits, in the engine's queue. That queue is bounded here, where a client can still be
    told to come back later, and not in the engine.

    Args:
        running: generation requests that the engine runs at once.
        queued: generation requests that may wait.
        retry_after: seconds, told to clients that are turned away.
    """

    def __init__(self, running: int, queued: int, retry_after: int) -> None:
        self.capacity = running + queued
        self.in_flight = 0
        self._retry_after = retry_after
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def reserve(self, choices: int, param: str) -> Iterator[None]:
        """Hold places for a request's choices while it is served.

        Args:
            choices: generation requests.
            param: the field to blame when they could never be admitted.

        Raises:
            ApiError: 429 if there is no room now; 400 if there never is.
        """
        if choices > self.capacity:
            raise invalid(
                f"The request asks for {choices} generations; this server takes at most {self.capacity} at once.", param
            )
        if self.in_flight + choices > self.capacity:
            raise overloaded("Too many requests are waiting; try again later.", self._retry_after)
        self.in_flight += choices
        self._empty.clear()
        try:
            yield
        finally:
            self.in_flight -= choices
            if not self.in_flight:
                self._empty.set()

    async def drained(self) -> None:
        """Returns when nothing is in flight."""
        await self._empty.wait()

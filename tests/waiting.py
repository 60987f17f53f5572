"""Waiting for what cannot be awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

GENEROUS_SECONDS = 180.0


def eventually(condition: Callable[[], bool], seconds: float = GENEROUS_SECONDS) -> None:
    """Return once ``condition`` holds; fail if it does not within a bound that no healthy machine reaches."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


async def until(condition: Callable[[], bool], seconds: float = GENEROUS_SECONDS) -> None:
    """The same on an event loop, which goes on meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.002)

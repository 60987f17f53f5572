"""Waiting for what cannot be awaited."""

from __future__ import annotations

import time
from collections.abc import Callable

GENEROUS_SECONDS = 60.0


def eventually(condition: Callable[[], bool], seconds: float = GENEROUS_SECONDS) -> None:
    """Return once ``condition`` holds; fail if it does not within a bound that no healthy machine reaches."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)

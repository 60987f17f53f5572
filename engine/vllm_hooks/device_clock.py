"""What the device itself takes for a step, apart from the time in which it waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch


class Event(Protocol):
    """As ``torch.cuda.Event``: recorded when the device comes to it."""

    def record(self) -> None:
        """Put the event behind whatever has been launched."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds of the device to a later event."""
        ...


class HostEvent:
    """For a device that computes in the calling thread."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        """Now."""
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, end_event: HostEvent) -> float:
        """Milliseconds to a later event."""
        return (end_event._at - self._at) * 1e3


def events_of(device: torch.device) -> Callable[[], Event]:
    """What makes events for a device."""
    if device.type == "cuda":
        return lambda: cast("Event", torch.cuda.Event(enable_timing=True))
    return HostEvent


class DeviceClock:
    """Adds up the stretches in which the device has work that is launched without a pause."""

    def __init__(self, event: Callable[[], Event]) -> None:
        self._event = event
        self._begin: Event | None = None
        self._stretches: list[tuple[Event, Event]] = []

    def begin(self) -> None:
        """A step begins; what was marked before is forgotten."""
        self._begin = None
        self._stretches = []

    def start(self) -> None:
        """Work is about to be launched."""
        self._begin = self._mark()

    def stop(self) -> None:
        """Work has been launched, since :meth:`start` if that was called."""
        if self._begin is not None:
            self._stretches.append((self._begin, self._mark()))
            self._begin = None

    def detach(self) -> Callable[[], float]:
        """The stretches since the last call: a function that waits for the end of the last one and returns seconds."""
        stretches, self._stretches = self._stretches, []

        def seconds() -> float:
            if not stretches:
                return 0.0
            stretches[-1][1].synchronize()
            return sum(begin.elapsed_time(end) for begin, end in stretches) / 1e3

        return seconds

    def _mark(self) -> Event:
        event = self._event()
        event.record()
        return event

"""Traces of generation requests, for OpenTelemetry. Off unless an endpoint is configured.

This module is what the rest of the server sees; it is light. :mod:`server.otlp`, which imports OpenTelemetry, is loaded
only where there is an endpoint. A request that is not traced costs one look at a context variable a choice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from engine.types import BASE
from server.settings import ConfigFileError, ServerConfig

if TYPE_CHECKING:
    from server.models import ModelTable
    from server.otlp import RequestTrace, Traces

MAX_STRETCHES = 128
"""Most spans below that of a choice; what is beyond is counted in the choice's span."""

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_current: ContextVar[RequestTrace | None] = ContextVar("collm_trace", default=None)


def current_trace() -> RequestTrace | None:
    """The trace of the HTTP request that is being served; None where it is not traced."""
    return _current.get()


def enter(trace: RequestTrace | None) -> None:
    """Make this the current trace of the running task, and of those that it starts."""
    _current.set(trace)


def start_tracing(config: ServerConfig, models: ModelTable) -> Traces | None:
    """Begin to collect traces, where there is an endpoint to send them to.

    Raises:
        ConfigFileError: OpenTelemetry is not installed, or refuses its settings.
    """
    if not _wanted(config):
        return None
    try:
        from server.otlp import Traces

        return Traces(config, models)
    except ImportError as error:
        raise ConfigFileError(
            f"server.otlp_endpoint: traces need opentelemetry-sdk and opentelemetry-exporter-otlp, see: {error}"
        ) from None
    except ValueError as error:
        raise ConfigFileError(f"server.otlp_endpoint: {error}") from None


def _wanted(config: ServerConfig) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if config.otlp_endpoint is not None:
        return True
    if os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    return any(os.environ.get(name, "").strip() for name in ENDPOINT_VARIABLES)


class Stretch(NamedTuple):
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
    home: int,
    begun: float,
    ended: float,
    finished: bool,
) -> list[Stretch]:
    """What a choice's time was spent on, in order and without gaps.

    Args:
        timeline: as in :class:`~engine.types.Delta`.
        sources: who wrote each token.
        home: the lane that writes what is not deferred.
        begun: when the request was submitted.
        ended: when its last token was seen.
        finished: it was not cut short: the last token is the end of its last step.
    """
    if not timeline:
        return [Stretch("queue", begun, ended)]
    writers: list[int] = []
    runs = [0]
    for source in sources:
        if source == home:
            runs[-1] += 1
        else:
            writers.append(source)
            runs.append(0)
    own = "base" if home == BASE else "expert"
    found = [Stretch("queue", begun, timeline[0])]
    since = timeline[0]
    came: Sequence[float] = timeline[2::2]
    for number, parked in enumerate(timeline[1::2]):
        found.append(Stretch(own, since, parked, home, runs[number] if number < len(runs) else None))
        since = came[number] if number < len(came) else ended
        writer = writers[number] if number < len(writers) else None
        found.append(Stretch("expert wait", parked, since, writer, None if writer is None else 1))
    parked_still = len(timeline) % 2 == 0
    if not parked_still and not (finished and sources and sources[-1] != home):
        found.append(Stretch(own, since, ended, home, runs[-1]))
    return found

"""Spans of generation requests, sent to an OpenTelemetry collector.

    POST /v1/chat/completions          the HTTP request; its parent is the client's traceparent
      chat MODEL                       what was generated for it, by OpenTelemetry's conventions for generative AI
        choice                         one for each answer
          queue, base, expert wait, base, expert wait, ..., base

No span has text of a prompt or of an answer, nor a message that might quote it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Message, Scope

from engine.types import BASE, Collaboration, Delta, EngineInfo, GenerationRequest
from server import __version__
from server.choice import ChoiceObserver
from server.errors import ApiError
from server.models import ModelTable
from server.settings import ServerConfig
from server.text.pieces import Piece
from server.trace.exporter import quiet_exporter
from server.trace.timeline import Stretch, merged, stretches

logger = logging.getLogger(__name__)

OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}

FLUSH_S = 3.0
"""Seconds that the last spans have to be sent when the server ends."""

QUEUE = 1 << 15
"""Spans that may wait to be sent, unless OTEL_BSP_MAX_QUEUE_SIZE says how many; a choice may have over a hundred."""

_SEVERITY = ("stop", "length", "aborted", "error")

Attributes = dict[str, Any]


def start_provider(config: ServerConfig) -> TracerProvider:
    """A provider that sends spans, in a thread of its own.

    Args:
        config: where to. What it leaves open is taken from OpenTelemetry's own environment variables.

    Raises:
        ImportError: the exporter is not installed.
        ValueError: a setting of OpenTelemetry's is wrong.
    """
    resource = Resource.create(
        {"service.name": "collm", "service.version": __version__, **OTELResourceDetector().detect().attributes}
    )
    queue = None if os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") else QUEUE
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(quiet_exporter(config), max_queue_size=queue))
    return provider


class Traces:
    """Makes spans.

    Args:
        provider: sends them; see :func:`start_provider`.
    """

    def __init__(self, provider: TracerProvider, models: ModelTable) -> None:
        self.models = models
        self._provider = provider
        self.tracer = provider.get_tracer("collm.server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        # A choice's stretches can be more than a hundred spans, which would hold up everybody's answers.
        self.background = ThreadPoolExecutor(1, thread_name_prefix="traces")

    def begin(self, scope: Scope, route: str) -> RequestTrace | None:
        """The trace of an HTTP request that has just arrived; None if it is not sampled."""
        carrier: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            if name in (b"traceparent", b"tracestate"):
                carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
        if len(carrier.get("traceparent", ())) > 1:
            carrier.clear()
        clock = _Clock()
        span = self.tracer.start_span(
            f"POST {route}",
            self._propagator.extract(carrier),
            api.SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "http.route": route,
                "url.scheme": scope.get("scheme", "http"),
                "collm.request_id": scope.get("request_id", ""),
            },
            start_time=clock.wall(clock.begun),
        )
        if not (isinstance(span, Span) and span.get_span_context().trace_flags.sampled):
            return None
        return RequestTrace(self, span, clock, OPERATIONS[route])

    async def shutdown(self, timeout: float = FLUSH_S) -> None:
        """Send what has not been sent, for so many seconds at most."""
        loop = asyncio.get_running_loop()
        sent = asyncio.Event()

        def flush() -> None:
            self.background.shutdown()
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(sent.set)

        # A thread of asyncio's would be joined at the end, however long a dead collector takes.
        threading.Thread(target=flush, name="traces-flush", daemon=True).start()
        try:
            await asyncio.wait_for(sent.wait(), timeout)
        except TimeoutError:
            logger.warning("the last traces could not be sent within %g s", timeout)


class RequestTrace:
    """The spans of one HTTP request, while it is served.

    Args:
        operation: what the route does, by the conventions' name.

    Attributes:
        generation: the span of what is generated; that of the HTTP request until it is known what is asked for.
        outcomes: how its choices ended, and it itself where it has none.
    """

    def __init__(self, traces: Traces, span: Span, clock: _Clock, operation: str) -> None:
        self.traces = traces
        self.generation: api.Span = span
        self.clock = clock
        self._http = span
        self._operation = operation
        self._prompts: dict[int, int] = {}
        self._finish_reasons: dict[int, str] = {}
        self._tokens = [0, 0]
        self.joint = False
        self.outcomes: list[str] = []

    def described(self, response_id: str, request: GenerationRequest, info: EngineInfo) -> None:
        """What was asked for; ``request`` is any of the response's choices."""
        member, sampling, models = request.collaboration.member, request.sampling, self.traces.models
        self.joint = member is None and len(info.lanes) > 1
        model = models.name if member is None else f"{models.name}/{models.lane_names[member]}"
        attributes: Attributes = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "collm",
            "gen_ai.request.model": model,
            "gen_ai.response.id": response_id,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
        }
        self.generation = self.traces.tracer.start_span(
            f"{self._operation} {model}",
            api.set_span_in_context(self._http),
            attributes=attributes,
            start_time=self.clock.wall(self.clock.begun),
        )

    def accepted(self, collaboration: Collaboration) -> None:
        """What is in force for one of the choices, which is the same for all."""
        if self.joint:
            given = {"collm.policy": collaboration.policy, "collm.threshold": collaboration.threshold}
            self.generation.set_attributes({name: value for name, value in given.items() if value is not None})

    def choice(self, index: int, prompt_index: int, request: GenerationRequest | None) -> ChoiceObserver:
        """See :class:`~server.choice.RequestObserver`."""
        if request is not None:
            self._prompts[prompt_index] = len(request.prompt)
        return ChoiceTrace(self, index, request)

    def responded(self, message: Message) -> None:
        """The response's head is being sent."""
        status = int(message["status"])
        self._http.set_attribute("http.response.status_code", status)
        if status < 400:
            stream = any(
                name.lower() == b"content-type" and b"event-stream" in value for name, value in message["headers"]
            )
            self.generation.set_attribute("gen_ai.request.stream", stream)
        elif status >= 500:
            self.fail(str(status))
        else:
            for span in self._spans:
                span.set_attribute("error.type", str(status))

    def fail(self, error: str) -> None:
        """The request failed, by our fault. The first reason stays."""
        if self._http.status.is_unset:
            for span in self._spans:
                span.set_attribute("error.type", error)
                span.set_status(api.StatusCode.ERROR, error)
        self.outcomes.append("error")

    def choice_ended(self, index: int, outcome: str, base: int, expert: int) -> None:
        """A choice ended, with so many tokens."""
        self._tokens[0] += base
        self._tokens[1] += expert
        self._finish_reasons[index] = outcome
        self.outcomes.append(outcome)

    def end(self) -> None:
        """The request was answered, or given up."""
        if self._finish_reasons:
            base, expert = self._tokens
            reasons = [reason for _, reason in sorted(self._finish_reasons.items())]
            attributes: Attributes = {
                "gen_ai.usage.input_tokens": sum(self._prompts.values()),
                "gen_ai.usage.output_tokens": base + expert,
                "gen_ai.response.finish_reasons": reasons,
                "collm.choices": len(reasons),
                **_shares(base, expert, joint=self.joint),
            }
            self.generation.set_attributes(attributes)
        if self.outcomes:
            self.generation.set_attribute("collm.finish_reason", max(self.outcomes, key=_SEVERITY.index))
        ended = self.clock.wall(time.monotonic())
        for span in self._spans:
            span.end(ended)

    @property
    def _spans(self) -> list[api.Span]:
        """Inner ones first."""
        return [self._http] if self.generation is self._http else [self.generation, self._http]


class ChoiceTrace:
    """The spans of one choice; see :class:`~server.choice.ChoiceObserver`. Times are of the monotonic clock."""

    def __init__(self, trace: RequestTrace, index: int, request: GenerationRequest | None) -> None:
        self._trace = trace
        self._index = index
        self._request = request
        self._begun = 0.0
        self._first: float | None = None
        self._ended: float | None = None
        self._sources: list[int] = []
        self._outcome = "aborted"

    def begun(self) -> None:
        """The choice is handed to the engine."""
        self._begun = time.monotonic()

    def accepted(self, collaboration: Collaboration) -> None:
        """The engine has taken it."""
        self._trace.accepted(collaboration)

    def wrote(self, piece: Piece) -> None:
        """A piece came."""
        now = time.monotonic()
        if piece.sources:
            self._sources += piece.sources
            if self._first is None:
                self._first = now
        if piece.finish_reason is not None:
            self._outcome, self._ended = piece.finish_reason, now

    def ended(self, last: Delta | None, failure: Exception | None) -> None:
        """It is complete, failed, or given up: now its spans are made."""
        try:
            self._make_spans(last, failure)
        except Exception:
            # The answer is worth more than its trace.
            logger.exception("a trace was lost")

    def _make_spans(self, last: Delta | None, failure: Exception | None) -> None:
        trace, ours, error = self._trace, False, None
        if isinstance(failure, ApiError):
            ours, error = failure.status >= 500, failure.code or str(failure.status)
        elif failure is not None:
            ours, error = True, type(failure).__qualname__
        if error is not None:
            self._outcome = "error"
        base = self._sources.count(BASE)
        expert = len(self._sources) - base
        trace.choice_ended(self._index, self._outcome, base, expert)
        if ours and error is not None:
            trace.fail(error)
        ended = self._ended or time.monotonic()
        found = self._stretches(last, ended, finished=error is None and self._ended is not None)
        shown = merged(found)
        attributes: Attributes = {
            "collm.choice.index": self._index,
            "collm.finish_reason": self._outcome,
            "gen_ai.usage.output_tokens": base + expert,
            **_shares(base, expert, joint=trace.joint),
            "collm.spans.merged": len(found) - len(shown),
            "collm.timeline": bool(found),
        }
        for name in {stretch.name for stretch in found}:
            seconds = sum(stretch.end - stretch.start for stretch in found if stretch.name == name)
            attributes[f"collm.{name.replace(' ', '_')}.seconds"] = seconds
        if self._first is not None:
            attributes["collm.time_to_first_token"] = self._first - self._begun
        if error is not None:
            attributes["error.type"] = error
        tracer, clock = trace.traces.tracer, trace.clock
        above = api.set_span_in_context(trace.generation)
        span = tracer.start_span("choice", above, attributes=attributes, start_time=clock.wall(self._begun))
        if ours:
            span.set_status(api.StatusCode.ERROR, error)
        span.end(clock.wall(ended))
        if shown:
            inside = api.set_span_in_context(span)
            trace.traces.background.submit(_make_stretches, trace, inside, shown)

    def _stretches(self, last: Delta | None, ended: float, *, finished: bool) -> list[Stretch]:
        if self._request is None or last is None or last.timeline is None:
            return []
        primary_lane = self._request.collaboration.member or BASE
        return stretches(
            last.timeline, self._sources, primary_lane=primary_lane, begun=self._begun, ended=ended, finished=finished
        )


class _Clock:
    """Translates the monotonic clock into wall time, so that a request's spans keep their order whatever happens to
    the wall clock meanwhile.
    """

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self._wall = time.time_ns()

    def wall(self, seconds: float) -> int:
        """Nanoseconds since 1970; never before the request."""
        return self._wall + max(0, int((seconds - self.begun) * 1e9))


def _make_stretches(trace: RequestTrace, above: Context, found: Sequence[Stretch]) -> None:
    # A blend's number is -1.
    names, tracer, clock = (*trace.traces.models.lane_names, "blend"), trace.traces.tracer, trace.clock
    for stretch in found:
        attributes: Attributes = {}
        if stretch.lane is not None:
            attributes["collm.lane"] = names[stretch.lane]
        if stretch.tokens is not None:
            attributes["collm.tokens"] = stretch.tokens
        if stretch.name == "expert wait" and stretch.lane is not None:
            attributes["collm.expert"] = names[stretch.lane]
        span = tracer.start_span(stretch.name, above, attributes=attributes, start_time=clock.wall(stretch.start))
        span.end(clock.wall(stretch.end))


def _shares(base: int, expert: int, *, joint: bool) -> Mapping[str, Any]:
    attributes: Attributes = {"collm.base_tokens": base, "collm.expert_tokens": expert}
    if joint and base + expert:
        attributes["collm.deferral_rate"] = expert / (base + expert)
    return attributes

"""Spans of generation requests, sent to an OpenTelemetry collector. Loaded only where traces are configured.

    POST /v1/chat/completions          the HTTP request; its parent is the client's traceparent
      choice                           one for each answer
        queue, base, expert wait, base, expert wait, ..., base

No span has text of a prompt or of an answer, nor a message that might quote it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from opentelemetry import trace as api
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.types import BASE, EngineInfo
from server import __version__
from server.context import route_path
from server.disconnect import ClientGone
from server.errors import ApiError
from server.generation import Choice
from server.models import ModelTable
from server.otlp_exporter import quiet_exporter
from server.settings import ServerConfig
from server.text.pieces import Piece
from server.tracing import MAX_STRETCHES, Stretch, enter, stretches

logger = logging.getLogger(__name__)

OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}

FLUSH_S = 3.0
"""Seconds that the last spans have to be sent when the server ends."""

_BATCH = 512
"""Most spans of one export request."""

_WITH_THRESHOLD = ("threshold", "confidence")
_SEVERITY = ("stop", "length", "aborted", "error")

Attributes = dict[str, Any]


class Traces:
    """Collects spans and sends them, in a thread of its own.

    Args:
        config: where to. What it leaves open is taken from OpenTelemetry's own environment variables.

    Raises:
        ImportError: the exporter is not installed.
        ValueError: a setting of OpenTelemetry's is wrong.
    """

    def __init__(self, config: ServerConfig, models: ModelTable) -> None:
        self.models = models
        resource = Resource.create(
            {"service.name": "collm", "service.version": __version__, **OTELResourceDetector().detect().attributes}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.ids = self._provider.id_generator
        self._processor = BatchSpanProcessor(_Expanding(quiet_exporter(config)))
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("collm.server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope, route: str) -> RequestTrace | None:
        """The trace of an HTTP request that has just arrived; None if it is not sampled."""
        carrier: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            if name in (b"traceparent", b"tracestate"):
                carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
        if len(carrier.get("traceparent", ())) > 1:
            carrier.clear()
        clock = _Clock()
        span = self._tracer.start_span(
            f"POST {route}",
            self._propagator.extract(carrier),
            api.SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "http.route": route,
                "url.scheme": scope.get("scheme", "http"),
                "gen_ai.operation.name": OPERATIONS[route],
                "gen_ai.provider.name": "collm",
                "collm.request_id": scope.get("request_id", ""),
            },
            start_time=clock.wall(clock.begun),
        )
        if not (isinstance(span, Span) and span.get_span_context().trace_flags.sampled):
            return None
        return RequestTrace(self, span, clock)

    def send(self, span: ReadableSpan) -> None:
        """Hand over a span that has ended. Does not wait."""
        self._processor.on_end(span)

    async def shutdown(self, timeout: float = FLUSH_S) -> None:
        """Send what has not been sent, for so many seconds at most."""
        loop = asyncio.get_running_loop()
        sent = asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(sent.set)

        # A thread of asyncio's would be joined at the end, however long a dead collector takes.
        threading.Thread(target=flush, name="traces-flush", daemon=True).start()
        try:
            await asyncio.wait_for(sent.wait(), timeout)
        except TimeoutError:
            logger.warning("the last traces could not be sent within %g s", timeout)


class TraceRequests:
    """Middleware: a span for every generation request. It stands inside of what gives requests their ids."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        trace: RequestTrace | None = None
        if scope["type"] == "http":
            if scope["method"] == "POST" and (route := route_path(scope)) in OPERATIONS:
                trace = self._traces.begin(scope, route)
            # None as well: a pipelined request is begun in the context of the one before it.
            enter(trace)
        if trace is None:
            await self._app(scope, receive, send)
            return
        noted = trace

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                noted.responded(message)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except (ClientGone, asyncio.CancelledError):
            trace.outcomes.append("aborted")
            raise
        except Exception as error:
            trace.fail(type(error).__qualname__)
            raise
        finally:
            trace.end()


class RequestTrace:
    """The span of one HTTP request, while it is served.

    Attributes:
        outcomes: how its choices ended, and it itself where it has none.
    """

    def __init__(self, traces: Traces, span: Span, clock: _Clock) -> None:
        self._traces = traces
        self._span = span
        self._clock = clock
        self._prompts: dict[int, int] = {}
        self._finish_reasons: dict[int, str] = {}
        self._tokens = [0, 0]
        self._joint = False
        self.outcomes: list[str] = []

    async def watch(
        self, info: EngineInfo, choice: Choice, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[Piece, None]:
        """A choice's pieces as they come; its spans are made when it has ended."""
        if choice.request is not None:
            choice.request = msgspec.structs.replace(choice.request, timeline=True)
        record = _ChoiceRecord()
        self._submitted(info, choice)
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    record.note(piece)
                    yield piece
        except ApiError as failure:
            record.fail(failure.code or str(failure.status), ours=failure.status >= 500)
            raise
        except Exception as failure:
            record.fail(type(failure).__qualname__, ours=True)
            raise
        finally:
            try:
                self._ended(choice, record)
            except Exception:
                # The answer is worth more than its trace.
                logger.exception("a trace was lost")

    def responded(self, message: Message) -> None:
        """The response's head is being sent."""
        status = int(message["status"])
        self._span.set_attribute("http.response.status_code", status)
        if status < 400:
            stream = any(
                name.lower() == b"content-type" and b"event-stream" in value for name, value in message["headers"]
            )
            self._span.set_attribute("gen_ai.request.stream", stream)
        elif status >= 500:
            self.fail(str(status))
        else:
            self._span.set_attribute("error.type", str(status))

    def fail(self, error: str) -> None:
        """The request failed, by our fault. The first reason stays."""
        if self._span.status.is_unset:
            self._span.set_attribute("error.type", error)
            self._span.set_status(api.StatusCode.ERROR, error)
        self.outcomes.append("error")

    def end(self) -> None:
        """The request was answered, or given up."""
        span = self._span
        if self._finish_reasons:
            base, expert = self._tokens
            reasons = [reason for _, reason in sorted(self._finish_reasons.items())]
            attributes: Attributes = {
                "gen_ai.usage.input_tokens": sum(self._prompts.values()),
                "gen_ai.usage.output_tokens": base + expert,
                "gen_ai.response.finish_reasons": reasons,
                "collm.choices": len(reasons),
                **_shares(base, expert, joint=self._joint),
            }
            span.set_attributes(attributes)
        if self.outcomes:
            span.set_attribute("collm.finish_reason", max(self.outcomes, key=_SEVERITY.index))
        span.end(self._clock.wall(time.monotonic()))

    def _submitted(self, info: EngineInfo, choice: Choice) -> None:
        """Before a choice is handed to the engine; the first one says what was asked for."""
        request = choice.request
        if request is None:
            return
        if not self._prompts:
            collaboration, sampling = request.collaboration, request.sampling
            member, models = collaboration.member, self._traces.models
            self._joint = member is None and len(info.lanes) > 1
            attributes: Attributes = {
                "gen_ai.request.model": models.name if member is None else f"{models.name}/{models.lane_names[member]}",
                "gen_ai.response.id": request.request_id.rpartition("-")[0],
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
            }
            if self._joint:
                gate = info.gate
                policy = collaboration.policy or (gate.policy if gate is not None else None)
                threshold = collaboration.threshold
                if threshold is None and gate is not None and policy == "threshold":
                    threshold = gate.threshold
                if policy not in _WITH_THRESHOLD:
                    threshold = None
                given = {"collm.policy": policy, "collm.threshold": threshold}
                attributes |= {name: value for name, value in given.items() if value is not None}
            self._span.set_attributes(attributes)
        self._prompts[choice.prompt_index] = len(request.prompt)

    def _ended(self, choice: Choice, record: _ChoiceRecord) -> None:
        base = record.sources.count(BASE)
        expert = len(record.sources) - base
        self._tokens[0] += base
        self._tokens[1] += expert
        self._finish_reasons[choice.index] = record.outcome
        self.outcomes.append(record.outcome)
        if record.ours and record.error is not None:
            self.fail(record.error)
        ended = record.ended or time.monotonic()
        found: list[Stretch] = []
        if choice.request is not None and choice.timeline is not None:
            found = stretches(
                choice.timeline,
                record.sources,
                home=choice.request.collaboration.member or BASE,
                begun=record.begun,
                ended=ended,
                finished=record.error is None and record.ended is not None,
            )
        attributes: Attributes = {
            "collm.choice.index": choice.index,
            "collm.finish_reason": record.outcome,
            "gen_ai.usage.output_tokens": base + expert,
            **_shares(base, expert, joint=self._joint),
            "collm.spans.dropped": max(0, len(found) - MAX_STRETCHES),
            "collm.timeline": bool(found),
        }
        for name in {stretch.name for stretch in found}:
            seconds = sum(stretch.end - stretch.start for stretch in found if stretch.name == name)
            attributes[f"collm.{name.replace(' ', '_')}.seconds"] = seconds
        if record.first is not None:
            attributes["collm.time_to_first_token"] = record.first - record.begun
        if record.error is not None:
            attributes["error.type"] = record.error
        self._traces.send(
            _ChoiceSpan(
                self._span, self._traces, self._clock, attributes, record, ended=ended, found=found[:MAX_STRETCHES]
            )
        )


class _ChoiceRecord:
    """What is noted of a choice while it is written. Times are of the monotonic clock."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.first: float | None = None
        self.ended: float | None = None
        self.sources: list[int] = []
        self.outcome = "aborted"
        self.error: str | None = None
        self.ours = False

    def note(self, piece: Piece) -> None:
        """A piece came."""
        now = time.monotonic()
        if piece.sources:
            self.sources += piece.sources
            if self.first is None:
                self.first = now
        if piece.finish_reason is not None:
            self.outcome, self.ended = piece.finish_reason, now

    def fail(self, error: str, *, ours: bool) -> None:
        """It failed; ``ours`` tells whose fault that is."""
        self.outcome, self.error, self.ours = "error", error, ours


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


class _ChoiceSpan(ReadableSpan):
    """The span of a choice that has ended. The spans below it are made when it is exported, off the event loop."""

    def __init__(
        self,
        request: Span,
        traces: Traces,
        clock: _Clock,
        attributes: Attributes,
        record: _ChoiceRecord,
        *,
        ended: float,
        found: list[Stretch],
    ) -> None:
        self._request = request
        self._traces = traces
        self._clock = clock
        self._found = found
        status = api.StatusCode.ERROR if record.ours else api.StatusCode.UNSET
        super().__init__(
            "choice",
            self._context_below(request.get_span_context()),
            request.get_span_context(),
            request.resource,
            attributes,
            start_time=clock.wall(record.begun),
            end_time=clock.wall(ended),
            status=api.Status(status, record.error if record.ours else None),
            instrumentation_scope=request.instrumentation_scope,
        )

    def children(self) -> list[ReadableSpan]:
        """The spans below this one, in order."""
        parent = self.get_span_context()
        assert parent is not None
        names = self._traces.models.lane_names
        spans = []
        for stretch in self._found:
            attributes: Attributes = {}
            if stretch.lane is not None:
                attributes["collm.lane"] = names[stretch.lane]
            if stretch.tokens is not None:
                attributes["collm.tokens"] = stretch.tokens
            if stretch.name == "expert wait" and stretch.lane is not None:
                attributes["collm.expert"] = names[stretch.lane]
            spans.append(
                ReadableSpan(
                    stretch.name,
                    self._context_below(parent),
                    parent,
                    self._request.resource,
                    attributes,
                    start_time=self._clock.wall(stretch.start),
                    end_time=self._clock.wall(stretch.end),
                    instrumentation_scope=self._request.instrumentation_scope,
                )
            )
        return spans

    def _context_below(self, parent: api.SpanContext) -> api.SpanContext:
        return api.SpanContext(
            parent.trace_id,
            self._traces.ids.generate_span_id(),
            is_remote=False,
            trace_flags=parent.trace_flags,
            trace_state=parent.trace_state,
        )


class _Expanding(SpanExporter):
    """Makes the spans below choices, and sends all of them in requests of a bounded size."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send; what the collector does not take is lost."""
        whole: list[ReadableSpan] = []
        for span in spans:
            whole.append(span)
            if isinstance(span, _ChoiceSpan):
                whole += span.children()
        for start in range(0, len(whole), _BATCH):
            result = self._exporter.export(whole[start : start + _BATCH])
            if result is not SpanExportResult.SUCCESS:
                return result
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """End the exporter."""
        self._exporter.shutdown()


def _shares(base: int, expert: int, *, joint: bool) -> Attributes:
    attributes: Attributes = {"collm.base_tokens": base, "collm.expert_tokens": expert}
    if joint and base + expert:
        attributes["collm.deferral_rate"] = expert / (base + expert)
    return attributes

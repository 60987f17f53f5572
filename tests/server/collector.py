"""A collector of OpenTelemetry traces: decodes what exporters send it over HTTP or gRPC."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanProto
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass
class Span:
    """A span that the collector received."""

    proto: SpanProto
    resource: dict[str, Any]

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def id(self) -> str:
        return self.proto.span_id.hex()

    @property
    def parent(self) -> str:
        return self.proto.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        return _values(self.proto.attributes)

    @property
    def failed(self) -> bool:
        return self.proto.status.code == Status.STATUS_CODE_ERROR

    @property
    def start(self) -> int:
        return self.proto.start_time_unix_nano

    @property
    def end(self) -> int:
        return self.proto.end_time_unix_nano


def _values(pairs: Any) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


QUIET_S = 0.5
"""Longer than the exporter waits for company."""


class Collector:
    """Stands in for an OpenTelemetry collector."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Span] = []
        self.raw = b""
        self.paths: set[str] = set()
        self._news = threading.Condition()

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._news:
            self.raw += body
            for resource in request.resource_spans:
                attributes = _values(resource.resource.attributes)
                self.spans += [Span(span, attributes) for scope in resource.scope_spans for span in scope.spans]
            self._news.notify_all()

    async def requests(self, count: int) -> list[Span]:
        """Returns the request spans once there are so many and nothing comes any more.

        What lies within a choice is made in the background, and may be exported after the request's own span.
        """

        def wait() -> list[Span]:
            with self._news:
                assert self._news.wait_for(lambda: len(self._requests()) >= count, 20), self.spans
                while self._news.wait(QUIET_S):
                    pass
                return self._requests()

        return await asyncio.to_thread(wait)

    def _requests(self) -> list[Span]:
        return [span for span in self.spans if span.proto.kind == SpanProto.SPAN_KIND_SERVER]

    def generation(self, request: Span) -> Span:
        """The span of what was generated for a request."""
        [found] = self.below(request)
        assert found.proto.kind == SpanProto.SPAN_KIND_INTERNAL
        return found

    def below(self, parent: Span) -> list[Span]:
        """Its children, by their beginning."""
        return sorted((span for span in self.spans if span.parent == parent.id), key=lambda span: span.start)

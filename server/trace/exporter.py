"""The exporter that carries spans to a collector, over HTTP or gRPC."""

from __future__ import annotations

import logging
import os
import time

from opentelemetry.sdk.trace.export import SpanExporter

from server.settings import ServerConfig

_QUIET_S = 60.0
_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
)


class _OnceAMinute(logging.Filter):
    """Lets through one message a minute: a collector that is down is worth a warning, not a flood."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _QUIET_S
        return True


_QUIET = _OnceAMinute()


def quiet_exporter(config: ServerConfig) -> SpanExporter:
    """The configured exporter, which complains at most once a minute.

    Raises:
        ValueError: a protocol that does not exist.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_QUIET)
    protocol = (
        config.otlp_protocol
        or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    endpoint = config.otlp_endpoint
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint)
    if protocol != "http/protobuf":
        raise ValueError(f"the protocol '{protocol}' is not supported; it may be 'http/protobuf' or 'grpc'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    if endpoint is not None and not endpoint.endswith("/v1/traces"):
        endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    return HttpExporter(endpoint)

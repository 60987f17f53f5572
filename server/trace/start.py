"""Whether to trace. OpenTelemetry is imported from here on, and only where there is an endpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from server.settings import ConfigFileError, ServerConfig

if TYPE_CHECKING:
    from server.models import ModelTable
    from server.trace.spans import Traces

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def start_tracing(config: ServerConfig, models: ModelTable) -> Traces | None:
    """Begin to collect traces, where there is an endpoint to send them to.

    Raises:
        ConfigFileError: OpenTelemetry is not installed, or refuses its settings.
    """
    if not _wanted(config):
        return None
    try:
        from server.trace.spans import Traces, start_provider

        return Traces(start_provider(config), models)
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

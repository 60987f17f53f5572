"""Uvicorn, set up for this server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from server.http_protocol import limited_protocol
from server.settings import ConfigFileError, ServerConfig

GRACEFUL_CLOSE_S = 2
"""Seconds that responses have to be sent once nothing more is generated."""


class HttpServer(uvicorn.Server):
    """Uvicorn without signal handlers of its own: its first move would be to close the listening socket, and late
    clients are to be told 503 instead.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not reached: signals are :class:`Lifecycle`'s."""
        raise NotImplementedError


def http_server(app: ASGIApp, settings: ServerConfig) -> HttpServer:
    """The HTTP server of an application, as configured; it listens on nothing yet.

    Raises:
        ConfigFileError: the certificate or its key cannot be used.
    """
    config = uvicorn.Config(
        app,
        http=limited_protocol(header_timeout=settings.header_timeout_s, write_timeout=settings.write_timeout_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # server.access writes it, with the tokens
        server_header=False,
        root_path=settings.root_path,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=GRACEFUL_CLOSE_S,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigFileError(f"server.tls_certificate, server.tls_key: {error}") from None
    return HttpServer(config)

"""One server's life: start the engine while HTTP answers already, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from engine.errors import EngineStartupError
from server.app import create_app
from server.engine_port import Engine
from server.http_protocol import limited_protocol
from server.service import Service
from server.settings import ConfigFileError

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

StartEngine = Callable[[], Awaitable[Engine]]

FAREWELL_S = 2
"""Seconds that answers have to be sent once nothing more is generated."""


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


class Lifecycle:
    """Runs a service until it is told to end, or its engine fails.

    Args:
        service: to be served.
        start_engine: starts an engine; called again for every restart.
        sock: bound socket.
        say: prints a line for whoever started the server.

    Raises:
        ConfigFileError: a file of the configuration (keys, certificate) cannot be used.
    """

    def __init__(
        self, service: Service, start_engine: StartEngine, sock: socket.socket, say: Callable[[str], None]
    ) -> None:
        self._service = service
        self._start_engine = start_engine
        self._sock = sock
        self._say = say
        self._signals = 0
        self._first_signal = asyncio.Event()
        self._second_signal = asyncio.Event()
        self._http = HttpServer(uvicorn_config(service))
        self.failure: str | None = None
        """Why :meth:`run` returned 1."""

    async def run(self) -> int:
        """Serve; returns the process's exit status.

        0 after a drain, 1 where the engine refused to start or died, 143 where a second signal cut the drain short.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        serving = asyncio.create_task(self._http.serve(sockets=[self._sock]), name="http")
        engine = asyncio.create_task(self._supervise(), name="supervise")
        ending = asyncio.create_task(self._first_signal.wait(), name="first-signal")
        hurry = asyncio.create_task(self._second_signal.wait(), name="second-signal")
        tasks = (serving, engine, ending, hurry)
        try:
            await asyncio.wait({serving, engine, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                await self._drain(hurry)
            if engine.done():
                self.failure = engine.result()
            self._http.should_exit = True
            await asyncio.wait({serving, hurry}, timeout=FAREWELL_S + 1, return_when=asyncio.FIRST_COMPLETED)
            if hurry.done():
                return 128 + signal.SIGTERM
            return 0 if ending.done() and self.failure is None else 1
        finally:
            self._http.force_exit = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_engine(FAREWELL_S if hurry.done() else None)
            if self._service.traces is not None:
                await self._service.traces.shutdown()
            self._service.tokenizer.close()

    async def _supervise(self) -> str:
        """Start the engine, and another one when it dies if so configured. Returns why there is none any more."""
        service = self._service
        while True:
            try:
                engine = await self._start_engine()
            except EngineStartupError as error:
                service.lose()
                return str(error)
            service.attach(engine)
            self._say(f"ready at {self._url()}")
            self._say(f"try: {self._example()}")
            reason = await engine.wait_dead()
            service.lose()
            await engine.shutdown()
            if service.settings.server.on_engine_death == "exit":
                return f"the engine died: {reason}"
            logger.error("the engine died: %s; starting another one", reason)
            service.reload()

    async def _drain(self, hurry: asyncio.Task[bool]) -> None:
        service = self._service
        service.drain()
        self._say(f"draining: {service.admission.in_flight} generations in flight")
        drained = asyncio.create_task(service.admission.drained())
        try:
            timeout = service.settings.server.drain_timeout_s
            await asyncio.wait({drained, hurry}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drained.cancel()

    async def _end_engine(self, timeout: float | None) -> None:
        engine = self._service.started_engine
        if engine is not None and engine.alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(engine.shutdown(), timeout)

    def _on_signal(self) -> None:
        self._signals += 1
        (self._first_signal if self._signals == 1 else self._second_signal).set()

    def _url(self) -> str:
        server = self._service.settings.server
        port = self._sock.getsockname()[1]
        host = f"[{server.host}]" if ":" in server.host else server.host
        return f"{'https' if server.tls_certificate else 'http'}://{host}:{port}{server.root_path}"

    def _example(self) -> str:
        body = f'{{"model": "{self._service.models.name}", "prompt": "Hello", "max_tokens": 32}}'
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._service.settings.server.keys() else ""
        return f"curl {self._url()}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def uvicorn_config(service: Service) -> uvicorn.Config:
    """How uvicorn serves a service.

    Raises:
        ConfigFileError: the certificate or its key cannot be used.
    """
    settings = service.settings.server
    config = uvicorn.Config(
        create_app(service),
        http=limited_protocol(header_timeout=settings.header_timeout_s, write_timeout=settings.write_timeout_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=settings.access_log,
        server_header=False,
        root_path=settings.root_path,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=FAREWELL_S,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigFileError(f"server.tls_certificate, server.tls_key: {error}") from None
    return config

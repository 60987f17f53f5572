"""One server's life: start the engine while HTTP answers already, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable

from engine.errors import EngineStartupError
from server.engine_port import Engine
from server.example import example_command
from server.http_server import GRACEFUL_CLOSE_S, HttpServer
from server.service import Service
from server.text.tokenizer import TokenizerError

logger = logging.getLogger(__name__)

StartEngine = Callable[[], Awaitable[Engine]]


class Lifecycle:
    """Runs a service until it is told to end, or its engine fails.

    Args:
        service: to be served.
        http: serves its application.
        start_engine: starts an engine; called again for every restart.
        sock: listening socket.
        print_status: prints a line for the operator.
    """

    def __init__(
        self,
        service: Service,
        http: HttpServer,
        start_engine: StartEngine,
        sock: socket.socket,
        print_status: Callable[[str], None],
    ) -> None:
        self._service = service
        self._http = http
        self._start_engine = start_engine
        self._sock = sock
        self._print_status = print_status
        self._signals = 0
        self._first_signal = asyncio.Event()
        self._second_signal = asyncio.Event()
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
        force = asyncio.create_task(self._second_signal.wait(), name="second-signal")
        tasks = (serving, engine, ending, force)
        try:
            await asyncio.wait({serving, engine, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                await self._drain(force)
            if engine.done():
                self.failure = engine.result()
            self._http.should_exit = True
            await asyncio.wait({serving, force}, timeout=GRACEFUL_CLOSE_S + 1, return_when=asyncio.FIRST_COMPLETED)
            if force.done():
                return 128 + signal.SIGTERM
            return 0 if ending.done() and self.failure is None else 1
        finally:
            self._http.force_exit = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_engine(GRACEFUL_CLOSE_S if force.done() else None)

    async def _supervise(self) -> str:
        """Start the engine, and another one when it dies if so configured. Returns why there is none any more."""
        service = self._service
        while True:
            try:
                engine = await self._start_engine()
            except EngineStartupError as error:
                service.lose()
                return str(error)
            try:
                await asyncio.to_thread(service.read_tokenizers, engine.info)
            except TokenizerError as error:
                service.lose()
                await engine.shutdown()
                return str(error)
            service.attach(engine)
            self._print_status(f"ready at {self._url()}")
            served = service.models.served(engine.info)
            if not served.gate and served.experts and "deferral" in served.strategies:
                threshold = served.thresholds.get(served.policy)
                at = "" if threshold is None else f" at threshold {threshold:g}"
                self._print_status(f"no gate: requests that name no policy get {served.policy!r}{at}")
            self._print_status(f"try: {example_command(service, self._url())}")
            reason = await engine.wait_dead()
            service.lose()
            await engine.shutdown()
            if service.settings.server.on_engine_death == "exit":
                return f"the engine died: {reason}"
            logger.error("the engine died: %s; starting another one", reason)
            service.reload()

    async def _drain(self, force: asyncio.Task[bool]) -> None:
        service = self._service
        service.drain()
        self._print_status(f"draining: {service.admission.in_flight} generations in flight")
        drained = asyncio.create_task(service.admission.drained())
        try:
            timeout = service.settings.server.drain_timeout_s
            await asyncio.wait({drained, force}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
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

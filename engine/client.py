"""The engine's client, for an event loop: sends requests to the engine's process, hands out deltas.

For scripts there is :mod:`engine.offline`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from engine.config import EngineConfig
from engine.errors import EngineDeadError, EngineStartupError, RequestError
from engine.messages import (
    Abort,
    Batch,
    Dead,
    FromEngine,
    Progress,
    Ready,
    Refused,
    Shutdown,
    Start,
    Submit,
    ToEngine,
)
from engine.process import BATCHES_SOCKET, REQUESTS_SOCKET
from engine.stats import EngineStats
from engine.supervisor import EngineProcess
from engine.types import Delta, EngineInfo, GenerationRequest

logger = logging.getLogger(__name__)

BatchCallback = Callable[[list[Delta], EngineStats], None]

SHUTDOWN_SECONDS = 10.0
"""How long the process may take to end by itself before it is killed."""

STEP_MARGIN_SECONDS = 2.0
"""How much longer than the lanes' own step timeout the engine may be silent: it reports an overdue step itself."""

LAST_WORD_SECONDS = 0.5
"""How long to wait, once the process has ended, for what it sent last."""


class EngineClient:
    """One engine process. Use :meth:`start`; all methods belong to the event loop that called it.

    Attributes:
        info: what the engine said of itself when it was ready.
        stats: the latest account.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._context = zmq.asyncio.Context()
        self._requests = self._context.socket(zmq.PUSH)
        self._batches = self._context.socket(zmq.PULL)
        for socket, name in ((self._requests, REQUESTS_SOCKET), (self._batches, BATCHES_SOCKET)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://{directory / name}")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._checker = msgspec.msgpack.Decoder(ToEngine)
        self._numbers = itertools.count()
        # On the wire every request has an id of its own: what is still under way for an abandoned request must not
        # reach a later one of the same name.
        self._streams: dict[str, _Stream] = {}
        self._wire_ids: dict[str, str] = {}
        self._callbacks: list[BatchCallback] = []
        self._heard = time.monotonic()
        self._reason: str | None = None
        self._dead = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._process: EngineProcess | None = None
        self.info: EngineInfo
        self.stats = EngineStats([])

    @classmethod
    async def start(cls, config: EngineConfig, *, on_progress: Callable[[str], None] | None = None) -> EngineClient:
        """Start an engine process and wait until it takes requests.

        Args:
            on_progress: called with one line at a time while models load.

        Raises:
            EngineStartupError: the engine refused; the message is one line.
        """
        client = cls(Path(tempfile.mkdtemp(prefix="collm-")))
        try:
            # Shielded: a process that was started while we were cancelled would be nobody's.
            starting = asyncio.ensure_future(client._spawn())
            try:
                await asyncio.shield(starting)
            except asyncio.CancelledError:
                await starting
                raise
            await client._handshake(config, on_progress or (lambda _: None))
        except BaseException:
            await client._close()
            raise
        return client

    async def _spawn(self) -> None:
        self._process = await EngineProcess.start(self._directory)

    async def _handshake(self, config: EngineConfig, on_progress: Callable[[str], None]) -> None:
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        # Waits until the process has connected, which it may never do.
        sending = asyncio.ensure_future(self._requests.send(self._encoder.encode(Start(config.model_dump_json()))))
        await asyncio.wait({ended, sending}, return_when=asyncio.FIRST_COMPLETED)
        while True:
            received = asyncio.ensure_future(self._batches.recv())
            await asyncio.wait({ended, received}, return_when=asyncio.FIRST_COMPLETED)
            if not received.done():
                # What it said last may still be on its way.
                await asyncio.wait({received}, timeout=LAST_WORD_SECONDS)
            if not received.done():
                received.cancel()
                sending.cancel()
                raise EngineStartupError(f"the engine process ended with status {ended.result()} while it was starting")
            match self._decoder.decode(received.result()):
                case Progress(message):
                    on_progress(message)
                case Ready(info):
                    self.info = info
                    break
                case Refused(message):
                    raise EngineStartupError(message)
        self._tasks = [
            asyncio.create_task(self._receive(), name="engine-receive"),
            asyncio.create_task(self._watch(ended), name="engine-watch"),
            asyncio.create_task(self._watch_steps(config.scheduler.step_timeout_seconds), name="engine-watch-steps"),
        ]

    # -- requests ---------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Deltas of one request; the last one has a finish_reason. Closing the iterator early aborts the request.

        Deltas that arrive while the caller is busy are merged into one, so that a slow reader costs a bounded number
        of objects.

        Raises:
            RequestError: the request's id is in use, or one of its numbers does not fit the wire.
            EngineDeadError: the engine is gone.
        """
        request_id = request.request_id
        if request_id in self._wire_ids:
            raise RequestError(f"request_id {request_id!r} is already in use")
        wire_id = f"{next(self._numbers)}:{request_id}"
        try:
            message = self._encoder.encode(Submit([msgspec.structs.replace(request, request_id=wire_id)]))
            # Structs do not check their fields when they are made; the engine could only drop what it cannot read.
            self._checker.decode(message)
        except (OverflowError, TypeError, ValueError) as error:
            raise RequestError(f"the request cannot be sent: {error}") from error
        if not self._awaited:
            self._heard = time.monotonic()  # an idle engine says nothing
        stream = self._streams[wire_id] = _Stream(request_id)
        self._wire_ids[request_id] = wire_id
        finished = False
        try:
            await self._send(message)
            while not finished:
                delta = await stream.get()
                if delta is None:
                    raise self._dead_error()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            del self._streams[wire_id], self._wire_ids[request_id]
            if not finished:
                with contextlib.suppress(EngineDeadError):
                    await asyncio.shield(self._send(self._encoder.encode(Abort([wire_id]))))

    async def abort(self, request_ids: list[str]) -> None:
        """Drop requests; their iterators end with finish_reason "aborted". Unknown ids are ignored."""
        wire_ids = [self._wire_ids[request_id] for request_id in request_ids if request_id in self._wire_ids]
        await self._send(self._encoder.encode(Abort(wire_ids)))

    def on_batch(self, callback: BatchCallback) -> None:
        """Call ``callback`` on the event loop with each batch. List-valued stats are increments.

        Its deltas are only to be looked at while it runs. An exception of it is logged and stops nobody else.
        """
        self._callbacks.append(callback)

    # -- life -------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._reason is None

    @property
    def pid(self) -> int:
        """The engine process's id."""
        assert self._process is not None
        return self._process.pid

    async def wait_dead(self) -> str:
        """Wait until the engine is gone; returns why."""
        await self._dead.wait()
        assert self._reason is not None
        return self._reason

    async def shutdown(self) -> None:
        """End the process and free everything. What still runs is dropped."""
        try:
            if self.alive:
                message = self._encoder.encode(Shutdown())
                with contextlib.suppress(EngineDeadError, TimeoutError):
                    await self._send(message)
                    self._die("the engine was shut down")
                    if self._process is not None:
                        await asyncio.wait_for(self._process.wait(), SHUTDOWN_SECONDS)
        finally:
            self._die("the engine was shut down")
            await self._close()

    # -- inside -----------------------------------------------------------------------------------------------

    @property
    def _awaited(self) -> bool:
        """Whether the engine owes anybody anything; what a slow reader has not taken yet it has long delivered."""
        return any(not stream.complete for stream in self._streams.values())

    def _dead_error(self) -> EngineDeadError:
        return EngineDeadError(self._reason or "the engine is gone")

    async def _send(self, message: bytes) -> None:
        if not self.alive:
            raise self._dead_error()
        try:
            await self._requests.send(message, zmq.NOBLOCK)
        except zmq.Again:
            # Nobody is at the other end any more; without the flag this would wait for ever. Why is known in a moment.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dead.wait(), 2 * LAST_WORD_SECONDS)
            raise self._dead_error() from None

    async def _receive(self) -> None:
        while True:
            try:
                message = self._decoder.decode(await self._batches.recv())
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                self._die(f"the engine sent a message that cannot be read: {error}")
                return
            match message:
                case Batch(deltas, stats):
                    self._take(deltas, stats)
                case Dead(message):
                    self._die(message)
                    return

    def _take(self, deltas: list[Delta], stats: EngineStats) -> None:
        self.stats = stats
        self._heard = time.monotonic()
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                delta.request_id = stream.request_id
                stream.put(delta)
        for callback in self._callbacks:
            try:
                callback(deltas, stats)
            except Exception:
                logger.exception("a callback on the engine's batches failed")

    async def _watch(self, ended: asyncio.Future[int]) -> None:
        status = await ended
        # A last word, if there was one, is more useful than an exit status.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._dead.wait(), LAST_WORD_SECONDS)
        self._die(f"the engine process ended with status {status}")

    async def _watch_steps(self, timeout: float) -> None:
        """End an engine that has work and says nothing: a lane that computes in its own process hangs."""
        patience = timeout + STEP_MARGIN_SECONDS
        while True:
            await asyncio.sleep(patience / 4)
            if self._awaited and time.monotonic() - self._heard > patience:
                self._die(f"a step of the engine timed out after {timeout:g} s")
                if self._process is not None:
                    self._process.kill()
                return

    def _die(self, reason: str) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        self._dead.set()
        for stream in self._streams.values():
            stream.end()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


class _Stream:
    """What has arrived for one request and is not taken yet: at most one delta, into which later ones are merged."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.complete = False
        self._delta: Delta | None = None
        self._ended = False
        self._news = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Add what arrived."""
        self.complete = delta.finish_reason is not None
        if self._delta is None:
            self._delta = delta
        else:
            self._delta.merge(delta)
        self._news.set()

    def end(self) -> None:
        """Nothing more will arrive: the engine is gone."""
        self._ended = True
        self._news.set()

    async def get(self) -> Delta | None:
        """All that has arrived since the last call, waiting for it; None if nothing more will."""
        if self._delta is None and not self._ended:
            await self._news.wait()
        self._news.clear()
        delta, self._delta = self._delta, None
        return delta

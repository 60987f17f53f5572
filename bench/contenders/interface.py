"""The one interface of all contenders."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bench import processes, reaper
from bench.http_client import Connection, HttpError, Pool
from bench.shapes import REPOSITORY, Member, Pair
from bench.workload import Cell, Job

HOST = "127.0.0.1"
START_SECONDS = 900.0
"""How long a server may take to start; large models on a cold disk take minutes."""
WORKING_BYTES = 4 << 30
"""What a lane needs on a GPU beside weights and KV cache."""

_Number = TypeVar("_Number", int, float)

Stamp = Callable[[], None]
"""Called by a contender at each arrival of text or tokens."""


class BenchError(Exception):
    """The bench cannot go on; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """What all contenders are started with.

    Attributes:
        max_num_seqs: most requests at once.
        request_tokens: of the longest request, prompt and answer together.
        scheduler: fields of the engine's ``SchedulerConfig``.
        vllm: engine options of vLLM under vLLM's names, for every engine.
        cuda: whether there is a CUDA device; else all is on CPU.
        log: file that the servers' output goes to.
    """

    pair: Pair
    max_num_seqs: int
    request_tokens: int
    scheduler: dict[str, Any] = field(default_factory=dict)
    vllm: dict[str, Any] = field(default_factory=dict)
    cuda: bool = False
    log: Path | None = None

    @property
    def max_model_len(self) -> int:
        """Context in tokens: what is needed, in whole KiB as people would set it."""
        return min(-(-self.request_tokens // 1024) * 1024, self.pair.max_model_len)

    def kv_bytes(self, member: Member) -> int:
        """Size of a member's KV cache in bytes: all requests at once, and blocks that are not full; or one context."""
        tokens = max(self.max_num_seqs * (self.request_tokens + 64), self.max_model_len + 64)
        return max(tokens * member.kv_bytes_per_token * 5 // 4, 32 << 20)

    def engine_options(self, member: Member) -> dict[str, Any]:
        """Engine options that this server's lane and a stock server of the same model have in common."""
        options: dict[str, Any] = {
            "dtype": self.pair.dtype,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": 8192 if self.cuda else 2048,
        }
        if self.cuda:
            share = (member.weights + self.kv_bytes(member) + WORKING_BYTES) / cuda_memory_bytes()
            options["gpu_memory_utilization"] = round(min(0.92, share), 3)
        else:
            options |= {"block_size": 32, "enforce_eager": True}
        return options | self.vllm


@dataclass
class Account:
    """The engine's own account of a stretch of work; times in seconds.

    Attributes:
        loop_seconds: wall time that the engine was not idle.
        step_seconds: the lanes' own steps, summed.
        steps: per lane.
        rows: rows in all those steps, per lane.
        computed: positions computed, per lane, prompts included.
        tokens: written tokens.
        expert_tokens: those that an expert wrote.
        lane_seconds: duration of the steps, per lane.
        accepted: tokens that the base drafted past a deferral and that stood.
        discarded: those that did not.
        agreements: deferred positions at which the expert wrote what the base would have written.
    """

    loop_seconds: float = 0.0
    step_seconds: float = 0.0
    steps: list[int] = field(default_factory=lambda: [0, 0])
    rows: list[int] = field(default_factory=lambda: [0, 0])
    computed: list[int] = field(default_factory=lambda: [0, 0])
    tokens: int = 0
    expert_tokens: int = 0
    lane_seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    accepted: int = 0
    discarded: int = 0
    agreements: int = 0

    def since(self, before: Account) -> Account:
        """What came after ``before``."""

        def minus(after: list[_Number], earlier: list[_Number]) -> list[_Number]:
            return [a - b for a, b in zip(after, earlier, strict=True)]

        return Account(
            self.loop_seconds - before.loop_seconds,
            self.step_seconds - before.step_seconds,
            minus(self.steps, before.steps),
            minus(self.rows, before.rows),
            minus(self.computed, before.computed),
            self.tokens - before.tokens,
            self.expert_tokens - before.expert_tokens,
            minus(self.lane_seconds, before.lane_seconds),
            self.accepted - before.accepted,
            self.discarded - before.discarded,
            self.agreements - before.agreements,
        )

    @property
    def share(self) -> float:
        """Coordination share: the part of the engine's time that no lane's step accounts for, 0 to 1."""
        return 1.0 - self.step_seconds / self.loop_seconds if self.loop_seconds else 0.0

    @property
    def own_microseconds_per_token(self) -> float:
        """The engine's own time for each token, in microseconds."""
        return 1e6 * (self.loop_seconds - self.step_seconds) / self.tokens if self.tokens else 0.0

    @property
    def limit_tokens_per_second(self) -> float:
        """What the lanes' own steps would allow if nothing else took time (lockstep)."""
        return self.tokens / self.step_seconds if self.step_seconds else 0.0

    @property
    def lane_step_seconds(self) -> list[float]:
        """Mean duration of a step, per lane; NaN for a lane without steps."""
        return [
            seconds / steps if steps else math.nan for seconds, steps in zip(self.lane_seconds, self.steps, strict=True)
        ]

    def rows_per_step(self, lane: int) -> float:
        """Mean number of rows in a lane's steps; NaN without steps."""
        return self.rows[lane] / self.steps[lane] if self.steps[lane] else math.nan


class Service(Protocol):
    """Something that runs: started once or for every round, and frozen while another contender is measured."""

    name: str

    async def start(self) -> None:
        """Start and wait until requests are taken.

        Raises:
            BenchError: it did not start.
        """
        ...

    async def stop(self) -> None:
        """End it, frozen or not."""
        ...

    @property
    def pid(self) -> int:
        """Root of its process tree."""
        ...


class Contender(Protocol):
    """One way of getting tokens out of a pair.

    Attributes:
        name: in tables.
        slow: an order of magnitude slower than the others: measured with one job a place instead of several.
    """

    name: str
    slow: bool

    @property
    def services(self) -> tuple[Service, ...]:
        """All that it needs running."""
        ...

    def takes(self, cell: Cell) -> bool:
        """Whether the cell means anything for it."""
        ...

    async def open(self) -> None:
        """Called before a turn, when the services run."""
        ...

    async def run(self, job: Job, stamp: Stamp) -> int:
        """Complete one job, calling ``stamp`` at each arrival; returns the number of tokens.

        Raises:
            BenchError, HttpError: it failed.
        """
        ...

    def account(self) -> Account | None:
        """The engine's account since it started, where it can be seen."""
        ...

    async def close(self) -> None:
        """Called after a turn, before services are frozen."""
        ...


class HttpService:
    """A server process with an HTTP port.

    Args:
        arguments: for Python, without the port.
        ready: path that answers 200 once requests are taken.
    """

    def __init__(self, name: str, arguments: list[str], ready: str, settings: Settings, env: dict[str, str]) -> None:
        self.name = name
        self._arguments = arguments
        self._ready = ready
        self._settings = settings
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def pid(self) -> int:
        """Root of its process tree."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """See :class:`Service`."""
        self.port = free_port()
        path = self._settings.log or Path(tempfile.gettempdir()) / "collm-bench.log"
        with path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments, "--host", HOST, "--port", str(self.port)],
                cwd=REPOSITORY,
                env=os.environ | self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is the bench's to handle: a frozen process could not.
                start_new_session=True,
            )
        reaper.look_after(self._process.pid)
        deadline = time.monotonic() + START_SECONDS
        while not await self._is_ready():
            status = self._process.poll()
            if status is not None:
                raise BenchError(f"{self.name} ended with status {status} while it was starting; see {path}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} was not ready after {START_SECONDS:.0f} s; see {path}")
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        """See :class:`Service`."""
        if self._process is not None:
            await asyncio.to_thread(processes.end, self._process.pid)
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(HOST, self.port)
            try:
                writer.write(f"GET {self._ready} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
        return False


async def stream_completion(pool: Pool, body: dict[str, Any], stamp: Stamp) -> int:
    """One streamed completion; returns the number of tokens that the server says it wrote.

    Raises:
        HttpError: it failed, or the stream has an error or no end.
    """
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    ending = b""
    connection: Connection
    with pool.connection() as connection:
        async for chunk in connection.stream("/v1/completions", body):
            # Servers send each event in a chunk of its own, or several together; neither splits one.
            if b'"choices":[{' in chunk:
                stamp()
            ending = ending[-4096:] + chunk
    if b'"error"' in ending or not ending.rstrip().endswith(b"data: [DONE]"):
        raise HttpError(f"the stream ended with {ending[-300:]!r}")
    _, found, usage = ending.rpartition(b'"completion_tokens":')
    if not found:
        raise HttpError("the stream has no usage")
    digits = usage[: len(usage) - len(usage.lstrip(b"0123456789 "))]
    return int(digits)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def cuda_memory_bytes() -> int:
    """Memory of the first CUDA device.

    Raises:
        BenchError: there is none.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"nvidia-smi: {error}") from error
    return int(output.split()[0]) << 20


@contextlib.asynccontextmanager
async def running(services: list[Service], on_start: Callable[[str], None]) -> AsyncIterator[None]:
    """All services started and frozen; ended at the end, whatever happens."""
    started: list[Service] = []
    try:
        for service in services:
            on_start(service.name)
            started.append(service)
            await service.start()
            processes.freeze(service.pid)
        yield
    finally:
        for service in reversed(started):
            await service.stop()

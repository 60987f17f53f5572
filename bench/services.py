"""Server processes: started, asked over HTTP, and frozen while another one is measured."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from bench import processes, reaper
from bench.contenders.base import Service, Stamp
from bench.errors import BenchError
from bench.http_client import Connection, HttpError, Pool
from bench.settings import Settings
from bench.shapes import REPOSITORY

HOST = "127.0.0.1"
START_SECONDS = 900.0
"""How long a server may take to start; large models on a cold disk take minutes."""


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
        """See :class:`~bench.contenders.base.Service`."""
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
        """See :class:`~bench.contenders.base.Service`."""
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


async def write_completion(pool: Pool, body: dict[str, Any]) -> str:
    """The text of one greedy completion.

    Raises:
        HttpError: it failed.
    """
    connection: Connection
    with pool.connection() as connection:
        answer = await connection.post("/v1/completions", {**body, "temperature": 0})
    return str(answer["choices"][0]["text"])


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def running(
    services: list[Service],
    on_start: Callable[[str], None],
    on_failure: Callable[[Service, BenchError], None] | None = None,
) -> AsyncIterator[None]:
    """All services started and frozen; ended at the end, whatever happens.

    Args:
        on_failure: called with a service that did not start, and why; the others go on.

    Raises:
        BenchError: one did not start, and there is no ``on_failure``.
    """
    started: list[Service] = []
    try:
        for service in services:
            on_start(service.name)
            started.append(service)
            try:
                await service.start()
            except BenchError as error:
                if on_failure is None:
                    raise
                on_failure(service, error)
                # What is left of it would hold memory that the next one needs.
                await started.pop().stop()
                continue
            processes.freeze(service.pid)
        yield
    finally:
        for service in reversed(started):
            await service.stop()

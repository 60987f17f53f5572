"""A small HTTP/1.1 client: POST of JSON over a kept connection, answers whole or as a stream of chunks.

The load generator shares the machine with what it measures, and a general client costs more CPU time a chunk than
some of the servers do (bench/LOG.md has the comparison with httpx). It speaks to servers on loopback only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import msgspec

_LIMIT = 1 << 22


class HttpError(Exception):
    """The server answered with another status than 200, or cut its answer short."""


class Connection:
    """One connection; one request at a time. Connects at the first request."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON, return the answer's JSON.

        Raises:
            HttpError: see there.
        """
        parts = [chunk async for chunk in self.stream(path, body)]
        return msgspec.json.decode(b"".join(parts))

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Send JSON, yield the answer's body in chunks as they arrive.

        Raises:
            HttpError: see there.
        """
        content = msgspec.json.encode(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        try:
            reader, writer = await self._connected()
            writer.write(head.encode() + content)
            await writer.drain()
            status, length = await _read_head(reader)
            if status != 200:
                answer = await reader.readexactly(length) if length is not None else b""
                raise HttpError(f"status {status}: {answer[:500].decode(errors='replace')}")
            if length is not None:
                yield await reader.readexactly(length)
                return
            while size := int(await reader.readline() or b"?", 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            await self.close()
            raise HttpError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            # An answer that is not read to its end would be taken for the next one's beginning.
            await self.close()
            raise

    async def close(self) -> None:
        """Close; the next request connects anew."""
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None or self._reader.at_eof():
            await self.close()
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=_LIMIT)
        return self._reader, self._writer


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, int | None]:
    """Status, and the body's length where it is not chunked."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    length = None
    for line in head.split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name == "content-length":
            length = int(value)
    return status, length


class Pool:
    """Connections to one server, reused. Close it before the server is paused for long."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._free: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @contextlib.contextmanager
    def connection(self) -> Any:
        """A connection for the time of a ``with`` block."""
        connection = self._free.pop() if self._free else Connection(*self._address)
        try:
            yield connection
        finally:
            self._free.append(connection)

    async def close(self) -> None:
        """Close all connections."""
        free, self._free = self._free, []
        for connection in free:
            await connection.close()

"""Limits below and at the edge of HTTP, with real uvicorn on a free port and raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.types import Delta, GenerationRequest
from server.app import create_app
from server.cli import bind
from server.http_server import HttpServer, http_server
from tests.server.conftest import Build, House
from tests.server.fakes import A, waits_forever
from tests.waiting import until

BODY = b'{"model": "collm-demo", "prompt": "Hello", "max_tokens": 2}'
LIMITS: dict[str, Any] = {
    "max_body_bytes": 100_000, "max_header_bytes": 8192, "max_headers": 50, "keep_alive_s": 2, "access_log": False,
}  # fmt: skip
HASTE = {"header_timeout_s": 0.6, "body_timeout_s": 0.6, "write_timeout_s": 0.6}
"""For tests that wait for these; on a busy machine a test's own requests may take as long."""


class Wire:
    """Raw connections to a served house."""

    def __init__(self, house: House, port: int, server: HttpServer) -> None:
        self.house = house
        self.port = port
        self._server = server

    def connections(self) -> int:
        """How many connections the server holds."""
        return len(self._server.server_state.connections)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, *parts: bytes) -> tuple[int, dict[str, str], Any]:
        """Send bytes, read one response: status, headers, parsed body. Status 0: closed without one."""
        reader, writer = await self.open()
        try:
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
            return await asyncio.wait_for(read_response(reader), 60)
        finally:
            writer.close()

    async def still_serves(self) -> None:
        status, _, body = await self.send(post(BODY))
        assert status == 200
        assert body["choices"][0]["text"] == "ab"
        # A request whose client has gone gives its place back a little after the engine has let go of it.
        await until(lambda: self.house.service.admission.in_flight == 0)


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0, {}, None
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers, json.loads(body) if body else None


def post(body: bytes, *headers: bytes, length: int | None = None, path: bytes = b"/v1/completions") -> bytes:
    head = [b"POST " + path + b" HTTP/1.1", b"Host: house", b"Content-Type: application/json", *headers]
    if length is None:
        length = len(body)
    if length >= 0:
        head.append(b"Content-Length: " + str(length).encode())
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def check(response: tuple[int, dict[str, str], Any], *statuses: int) -> None:
    status, _, body = response
    assert status in statuses, response
    assert set(body["error"]) == {"message", "type", "param", "code"}


@contextlib.asynccontextmanager
async def listening(house: House) -> AsyncIterator[Wire]:
    server = http_server(create_app(house.service), house.service.settings.server)
    sock = bind("127.0.0.1", 0)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield Wire(house, sock.getsockname()[1], server)
    finally:
        server.should_exit = True
        await asyncio.wait_for(serving, 30)


@pytest.fixture
async def wire(build: Build) -> AsyncIterator[Wire]:
    async with listening(await build(server=LIMITS)) as found:
        yield found


@pytest.fixture
async def hasty(build: Build) -> AsyncIterator[Wire]:
    """A server that waits for nobody."""
    async with listening(await build(server=LIMITS | HASTE)) as found:
        yield found


async def test_a_good_request_and_a_kept_connection(wire: Wire) -> None:
    reader, writer = await wire.open()
    for _ in range(3):
        writer.write(post(BODY))
        status, headers, _ = await read_response(reader)
        assert status == 200
        assert "server" not in headers
        assert headers["x-request-id"]
    writer.close()


async def test_pipelined_requests(wire: Wire) -> None:
    reader, writer = await wire.open()
    writer.write(post(BODY) * 3)
    assert [(await read_response(reader))[0] for _ in range(3)] == [200] * 3
    writer.close()


async def test_a_declared_body_that_is_too_large_is_refused_before_it_is_sent(wire: Wire) -> None:
    check(await wire.send(post(b"", length=60_000_000)), 413)
    check(await wire.send(post(b"", b"Expect: 100-continue", length=60_000_000)), 413)
    await wire.still_serves()


async def test_a_body_of_60_mb_is_refused_while_it_is_sent(wire: Wire) -> None:
    """And the client gets to read the answer, although it is still sending."""
    chunk = b" " * 65536
    response = await wire.send(post(b"", length=60_000_000), *[chunk] * 20)
    check(response, 413)
    await wire.still_serves()


async def test_a_chunked_body_is_counted_as_it_comes(wire: Wire) -> None:
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    check(await wire.send(post(b"", b"Transfer-Encoding: chunked", length=-1), *[chunk] * 30), 413)
    good = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
    status, _, _ = await wire.send(post(good, b"Transfer-Encoding: chunked", length=-1))
    assert status == 200


async def test_heads_that_are_too_large(wire: Wire) -> None:
    one = b"X-Long: " + b"a" * 5_000_000
    response = await wire.send(post(BODY, one))
    assert response[0] in (0, 431)
    check(await wire.send(post(BODY, b"X-Long: " + b"a" * 20_000)), 431)
    check(await wire.send(post(BODY, *[b"X-%d: 1" % i for i in range(100)])), 431)
    check(await wire.send(post(BODY, *[b"X-%d: 1" % i for i in range(2000)])), 431)
    check(await wire.send(b"GET /" + b"a" * 20_000), 431)
    await wire.still_serves()


async def test_a_head_that_never_ends(hasty: Wire) -> None:
    check(await hasty.send(post(BODY)[:40]), 408)
    # Nor does a trickle help.
    reader, writer = await hasty.open()
    closed = asyncio.create_task(reader.read())
    async with asyncio.timeout(8):
        while not closed.done():
            writer.write(b"G")
            await asyncio.sleep(0.05)
    # Bytes that come after the farewell reset the connection, and may take the farewell with them.
    reset = isinstance(closed.exception(), ConnectionError)
    assert reset or closed.result().startswith(b"HTTP/1.1 408 ")
    writer.close()
    await hasty.still_serves()


async def test_a_connection_that_says_nothing_is_closed(hasty: Wire) -> None:
    reader, writer = await hasty.open()
    assert await asyncio.wait_for(reader.read(), 8) == b""
    writer.close()


async def test_the_second_head_of_a_connection_is_timed_too(hasty: Wire) -> None:
    reader, writer = await hasty.open()
    writer.write(post(BODY))
    assert (await read_response(reader))[0] == 200
    writer.write(b"GET /health HT")
    check(await asyncio.wait_for(read_response(reader), 8), 408)
    writer.close()


async def test_a_body_that_never_ends(hasty: Wire) -> None:
    check(await hasty.send(post(b'{"model"', length=len(BODY))), 408)
    check(await hasty.send(post(b"5\r\nhello\r\n", b"Transfer-Encoding: chunked", length=-1)), 408)
    await hasty.still_serves()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 garbage\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nBad Header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n",
        post(BODY, b"Content-Length: 3"),
        post(BODY, b"Content-Length: -3", length=-1),
        post(BODY, b"Content-Length: x", length=-1),
        post(BODY, b"Content-Length: " + b"9" * 5000, length=-1),
        post(b"zz\r\n", b"Transfer-Encoding: chunked", length=-1),
        post(BODY, b"Transfer-Encoding: gzip", length=-1),
    ],
    ids=range(12),
)
async def test_garbage(wire: Wire, raw: bytes) -> None:
    check(await wire.send(raw), 400, 413, 501)
    await wire.still_serves()


async def test_content_length_with_transfer_encoding(wire: Wire) -> None:
    """Request smuggling's favourite: whoever is in front may believe the other one."""
    chunked = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
    check(await wire.send(post(chunked, b"Transfer-Encoding: chunked", length=5)), 400)
    await wire.still_serves()


async def test_a_reader_that_reads_nothing_is_let_go(hasty: Wire) -> None:
    """The engine is held up by it no longer than the write timeout, and memory is bounded meanwhile."""
    written = 0

    async def endless(request: GenerationRequest) -> AsyncIterator[Delta]:
        nonlocal written
        while True:
            written += 1
            yield Delta(request.request_id, [A] * 1000, [0] * 1000, [0.5] * 1000)
            await asyncio.sleep(0)

    good = hasty.house.engine.script
    hasty.house.engine.script = endless
    _, writer = await hasty.open()
    body = (
        b'{"model": "collm-demo", "prompt": "a", "max_tokens": 200, "stream": true, "collaboration": {"report": true}}'
    )
    writer.write(post(body))
    await until(lambda: bool(hasty.house.engine.closed_early))
    assert written * 1000 < 10_000_000
    writer.close()
    hasty.house.engine.script = good
    await hasty.still_serves()


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_200_clients_that_go_at_once(wire: Wire, stream: bytes) -> None:
    good = wire.house.engine.script
    wire.house.engine.script = waits_forever
    body = b'{"model": "collm-demo", "prompt": "a", "max_tokens": 9, "stream": ' + stream + b"}"
    writers = []
    for _ in range(200):
        _, writer = await wire.open()
        writer.write(post(body))
        writers.append(writer)
    await until(lambda: len(wire.house.engine.seen) == 200, 120)
    for writer in writers:
        writer.transport.abort()
    await until(lambda: len(wire.house.engine.closed_early) == 200, 120)
    wire.house.engine.script = good
    await wire.still_serves()
    aborted = await wire.house.metric("collm_requests_total", model_name="collm-demo", outcome="aborted")
    assert aborted == 200


async def test_a_root_path(build: Build) -> None:
    """As behind a proxy that strips the prefix; keys are asked for all the same, and probes stay open."""
    house = await build(server={**LIMITS, "root_path": "/llm", "api_keys": ["k"]})
    async with listening(house) as wire:
        assert (await wire.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 200
        check(await wire.send(post(BODY)), 401)
        assert (await wire.send(post(BODY, b"Authorization: Bearer k")))[0] == 200

"""HTTP as client libraries speak it: large bodies, early departures, HEAD, upgrade offers. Real uvicorn, a port."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.error
import urllib.request
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Build
from tests.server.test_limits import BODY, Wire, listening, post, read_response, wire
from tests.waiting import until

__all__ = ["wire"]

LIMIT = 100_000
LARGE = 20_000_000


def _check(error: dict[str, Any]) -> None:
    assert error["code"] == "body_too_large"
    assert str(LIMIT) in error["message"]


@pytest.mark.parametrize("size", [LIMIT + 1, 1_000_000, LARGE])
async def test_413_arrives_with_httpx(wire: Wire, size: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{wire.port}", timeout=60) as client:
        for _ in range(2):
            response = await client.post("/v1/completions", json={"model": "collm-demo", "prompt": "x" * size})
            assert response.status_code == 413
            assert response.headers["connection"] == "close"
            _check(response.json()["error"])
    await wire.still_serves()


async def test_413_arrives_with_the_sdk(wire: Wire) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{wire.port}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="collm-demo", prompt="x" * LARGE)
    assert caught.value.status_code == 413
    _check(caught.value.body)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [LIMIT + 1, LARGE])
async def test_413_arrives_with_urllib(wire: Wire, size: int) -> None:
    """It sends ``Connection: close``, and the whole body before it looks for an answer."""

    def ask() -> bytes:
        body = BODY + b" " * (size - len(BODY))
        request = urllib.request.Request(
            f"http://127.0.0.1:{wire.port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        assert caught.value.code == 413
        return caught.value.read()

    _check(json.loads(await asyncio.to_thread(ask))["error"])
    await wire.still_serves()


async def _send_for_ever(writer: asyncio.StreamWriter, pause: float) -> None:
    while True:
        writer.write(b" " * 65536)
        await writer.drain()
        await asyncio.sleep(pause)


async def test_a_refused_body_is_not_read_for_ever(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never stops sending is let go, and one that stops without hanging up too."""
    monkeypatch.setattr("server.http_protocol.LINGER_S", 1.0)
    monkeypatch.setattr("server.http_protocol.LINGER_IDLE_S", 0.3)
    for pause in (0.02, None):
        reader, writer = await wire.open()
        writer.write(post(b"", length=10**9))
        status, headers, _ = await read_response(reader)
        assert status == 413
        assert headers["connection"] == "close"
        async with asyncio.timeout(8):
            if pause is None:
                assert await reader.read() == b""
                await until(lambda: not wire.connections())
            else:
                with pytest.raises(ConnectionError):
                    await _send_for_ever(writer, pause)
        writer.close()
    await wire.still_serves()


@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/chat/completions", b"/tokenize"])
async def test_a_client_that_leaves_while_it_sends(wire: Wire, path: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Its status in the metrics is 499, and the log has no error."""
    caplog.set_level(logging.INFO)
    labels = {"route": path.decode(), "method": "POST", "status": "499"}
    counter = wire.house.service.metrics.registry
    _, writer = await wire.open()
    writer.write(post(b'{"model": ', length=5000, path=path))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await until(lambda: counter.get_sample_value("collm_http_requests_total", labels) == 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    await wire.still_serves()


@pytest.mark.parametrize("playground", ["key", "off"])
async def test_head_is_get_without_a_body(build: Build, playground: str) -> None:
    house = await build(server={"playground": playground})
    paths = ["/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/collm-demo/base", "/openapi.json"]
    if playground != "off":
        paths += ["/", "/docs", "/static/app.js"]
    async with listening(house) as served, httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as client:
        for path in paths:
            got, head = await client.get(path), await client.head(path)
            assert got.status_code == head.status_code == 200, path
            assert head.content == b""
            assert head.headers["content-type"] == got.headers["content-type"]
            if path != "/metrics":  # which counts these requests
                assert head.headers["content-length"] == got.headers["content-length"]
        assert (await client.head("/v1/models/nothing")).status_code == 404
        assert (await client.head("/v1/completions")).status_code == 405
        assert (await client.head("/nothing")).status_code == 404
    labels = {"route": "/health", "method": "HEAD", "status": "200"}
    assert house.service.metrics.registry.get_sample_value("collm_http_requests_total", labels) == 1
    document = (await house.http.get("/openapi.json")).json()
    assert all("head" not in methods for methods in document["paths"].values())


async def test_an_offer_of_http2_is_ignored_in_silence(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """As Java's client sends it by default, on a connection that is used again."""
    caplog.set_level(logging.INFO)
    offer = (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA",
    )
    reader, writer = await wire.open()
    for _ in range(3):
        writer.write(post(BODY, *offer))
        status, _, body = await asyncio.wait_for(read_response(reader), 10)
        assert status == 200
        assert body["choices"][0]["text"] == "ab"
    writer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

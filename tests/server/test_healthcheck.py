"""The image's health check, against servers with and without a certificate."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from server import healthcheck
from server.app import create_app
from server.http_server import http_server
from server.service import Service
from server.text.tokenizer import TextTokenizer
from tests.server.fakes import settings
from tests.waiting import until


@asynccontextmanager
async def served(tokenizer: TextTokenizer, **server: object) -> AsyncIterator[tuple[Service, int]]:
    """A service whose models still load, on a port of its own."""
    service = Service(settings(server=server), tokenizer)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        http = http_server(create_app(service), service.settings.server)
        task = asyncio.create_task(http.serve(sockets=[sock]))
        await until(lambda: http.started)
        yield service, sock.getsockname()[1]
        http.should_exit = True
        await task


async def check(port: int) -> int:
    return await asyncio.to_thread(healthcheck.main, [str(port)])


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A certificate of some other name, signed by nobody."""
    folder = tmp_path_factory.mktemp("pem")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=llm.example"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    return {"tls_certificate": certificate, "tls_key": key}


@pytest.mark.parametrize("tls", [False, True])
async def test_a_server_is_healthy_until_its_engine_is_dead(
    tokenizer: TextTokenizer, pem: dict[str, object], tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with served(tokenizer, api_keys=["key"], **(pem if tls else {})) as (service, port):
        assert await check(port) == 0
        service.lose()
        assert await check(port) == 1
    assert await check(port) == 1


async def test_whoever_does_not_answer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert await check(silent.getsockname()[1]) == 1

"""Schemathesis: requests made up from the server's own OpenAPI document, good and bad ones, against the application
with stand-in lanes in a real engine process.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from engine.client import EngineClient
from server.app import create_app
from server.cli import bind
from server.http_server import http_server
from server.service import Service
from server.text.tokenizer import TextTokenizer
from tests.server.fakes import TEMPLATE, byte_level_tokenizer, settings
from tests.waiting import eventually

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import hypothesis  # noqa: E402
from hypothesis import HealthCheck  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = 40
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class Served:
    """The application on a free port, in a thread."""

    def __init__(self) -> None:
        self.sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self._ready = threading.Event()
        self._server: uvicorn.Server | None = None
        self.service: Service
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    async def _run(self) -> None:
        lane = {"backend": "bench.standin", "vllm": {"vocab_size": 330, "max_model_len": 256}}
        given = settings(base={"model": "base", **lane}, experts=[{"name": "codes", "model": "expert", **lane}])
        tokenizer = TextTokenizer(byte_level_tokenizer(), {"chat_template": TEMPLATE, "eos_token": "<|end|>"})
        self.service = Service(given, tokenizer)
        engine = await EngineClient.start(given.engine)
        self.service.attach(engine)
        self._server = http_server(create_app(self.service), self.service.settings.server)
        self._ready.set()
        await self._server.serve(sockets=[self.sock])
        await engine.shutdown()

    def end(self) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.end()


ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("GET", "/version"),
    ("GET", "/health"),
    ("GET", "/ready"),
]


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, "positive") for route in ROUTES] + [(*route, "negative") for route in ROUTES if route[0] == "POST"],
)
def test_made_up_requests(served: Served, method: str, path: str, mode: str) -> None:
    """No 5xx, only documented statuses and shapes; model names are made good so that most requests get through."""
    operation = schemathesis.openapi.from_url(f"{served.url}/openapi.json")[path][method]

    @hypothesis.settings(
        max_examples=EXAMPLES if method == "POST" else 10,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "collm-demo"
            if isinstance(case.body.get("n"), int) and case.body["n"] > 4:
                case.body["n"] = 4
        response = case.call(base_url=served.url)
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            error = json.loads(response.content)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(error["message"]) < 600

    check()
    eventually(lambda: served.service.admission.in_flight == 0)


def test_every_described_route_is_tried(served: Served) -> None:
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json").raw_schema
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described - set(ROUTES) == {("GET", "/metrics")}  # text, and no parameters

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.service import Service
from server.text.tokenizer import TextTokenizer
from server.trace.start import start_tracing
from tests.server.fakes import TEMPLATE, FakeEngine, Script, byte_level_tokenizer, letters, settings, writes


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(byte_level_tokenizer(), {"chat_template": TEMPLATE, "eos_token": "<|end|>"})


@dataclass
class House:
    """A served fake engine."""

    http: httpx.AsyncClient
    engine: FakeEngine
    service: Service
    traces: Any = None

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "collm-demo", "prompt": "Hello", **fields}
        return await self.http.post("/v1/completions", json=body)

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "collm-demo", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def metric(self, name: str, **labels: str) -> float:
        await self.http.get("/metrics")
        value = self.service.metrics.registry.get_sample_value(name, labels)
        assert value is not None, (name, labels)
        return value

    async def total(self, name: str, **labels: str) -> float:
        """The sum over all series that have these labels, and maybe others."""
        await self.http.get("/metrics")
        samples = [sample for family in self.service.metrics.registry.collect() for sample in family.samples]
        found = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
        assert found, (name, labels)
        return sum(found)


Build = Callable[..., Awaitable[House]]


@pytest.fixture
async def build(tokenizer: TextTokenizer) -> AsyncIterator[Build]:
    """Builds houses: ``await build(script, server={...})``."""
    async with AsyncExitStack() as stack:

        async def make(
            script: Script | None = None,
            *,
            gate: bool = True,
            attach: bool = True,
            curve: Iterable[tuple[float, float]] = (),
            costs: Iterable[tuple[float, float]] = (),
            **parts: Any,
        ) -> House:
            service = Service(settings(**parts), tokenizer)
            engine = FakeEngine(
                script or writes(letters("abcdefgh")),
                gate=gate,
                policy=service.settings.gate.policy,
                lane_names=service.models.lane_names,
                curve=curve,
                costs=costs,
            )
            if attach:
                service.attach(engine)
            traces = start_tracing(service.settings.server, service.models)
            transport = httpx.ASGITransport(create_app(service, traces))
            http = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://house"))
            return House(http, engine, service, traces)

        yield make


@pytest.fixture
async def house(build: Build) -> House:
    return await build()

"""The configurations that are shipped for blends: each method by its name, and what the engine is asked for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engine.blends import Blend
from engine.types import Collaboration
from server.app import create_app
from server.service import Service
from server.settings import Settings
from server.text.tokenizer import TextTokenizer
from tests.live import serving
from tests.packaging.sources import ROOT
from tests.server.fakes import FakeEngine, letters, writes

CONFIGS = ROOT / "deploy" / "config"
DEMO, PROXY = CONFIGS / "demo-blends.toml", CONFIGS / "example-proxy.toml"
PROMPT = "Question: What is the alpha-3 code of Liberia?\nAnswer:"


@dataclass(frozen=True)
class Method:
    """A request by name, and what it means."""

    name: str
    config: Path
    request: dict[str, Any]
    wants: Callable[[Collaboration], bool]


def by_name(name: str) -> dict[str, Any]:
    return {"collaboration": {"blend": name, "report": True}}


THIRDS = tuple((lane, pytest.approx(1 / 3)) for lane in range(3))
METHODS = [
    Method(
        "ensemble where the base is unsure (GaC)",
        DEMO,
        by_name("half"),
        lambda c: (c.policy, c.threshold, c.blend) == ("confidence", 0.5, Blend("mixture", ((0, 0.5), (1, 0.5)))),
    ),
    Method(
        "marginal of the gate",
        DEMO,
        by_name("marginal"),
        lambda c: c.policy == "always" and c.blend is not None and c.blend.from_gate,
    ),
    Method(
        "union, of a model name of its own",
        DEMO,
        {"model": "collm-union", "collaboration": {"report": True}},
        lambda c: c.blend is not None and (c.blend.kind, c.blend.top, c.blend.weights) == ("union", 5, THIRDS),
    ),
    Method(
        "contrastive decoding",
        DEMO,
        by_name("contrastive"),
        lambda c: c == Collaboration(
            policy="always", blend=Blend("product", ((0, -0.5), (1, 1.5)), anchor=1, plausibility=0.1)
        ),
    ),
    Method(
        "product",
        DEMO,
        by_name("difference"),
        lambda c: c.blend == Blend("product", ((0, 0.5), (1, 1.0), (2, -0.5)), anchor=1, plausibility=0.05),
    ),
    Method(
        "classifier-free guidance",
        DEMO,
        by_name("guided"),
        lambda c: c.policy == "always"
        and c.blend is not None
        and c.blend.weights == ((0, 1.3), (3, pytest.approx(-0.3)))
        and [lane for lane, _ in c.prompts] == [3],
    ),
    Method(
        "proxy tuning, of a model name of its own",
        PROXY,
        {"model": "collm-large-tuned", "collaboration": {"report": True}},
        lambda c: c.policy == "always" and c.blend == Blend("product", ((0, 1.0), (1, 1.0), (2, -1.0))),
    ),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_what_the_engine_is_asked(method: Method, tokenizer: TextTokenizer) -> None:
    service = Service(Settings(config=method.config), tokenizer)
    engine = FakeEngine(writes(letters("abc")), lane_names=service.models.lane_names)
    service.attach(engine)
    transport = httpx.ASGITransport(create_app(service))
    body = {"model": service.settings.served_model_name, "prompt": "Hello", "max_tokens": 3, **method.request}
    async with httpx.AsyncClient(transport=transport, base_url="http://house") as http:
        response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    (request,) = engine.seen
    asked = msgspec.structs.replace(request.collaboration, looks=False)
    assert method.wants(asked), asked


@pytest.mark.slow  # starts three engines
def test_what_is_written(tmp_path: Path) -> None:
    with serving(DEMO, tmp_path) as server:
        for method in METHODS:
            if method.config is not DEMO:
                continue
            body = {"model": "collm-demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **method.request}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            (choice,) = answer["choices"]
            blended = answer["usage"]["completion_tokens_details"]["blended_tokens"]
            assert blended == choice["collaboration"]["sources"].count("blend") > 0, method.name
            assert choice["text"].strip(), method.name
        assert server.is_empty()

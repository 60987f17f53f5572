"""Members of one vocabulary that read a conversation by chat templates of their own (``server.chat_templates``)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from server.app import create_app
from server.service import Service
from server.text.tokenizer import TextTokenizer
from tests.server.conftest import House
from tests.server.fakes import FakeEngine, byte_level_tokenizer, check_error, letters, settings, writes

TUNED = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
LANE = {"backend": "bench.standin", "vllm": {"vocab_size": 512, "max_model_len": 256}}
PROXY = {"policy": "always", "blend": {"kind": "product", "weights": {"base": 1, "tuned": 1, "untuned": -1}}}

Serve = Callable[[str], Awaitable[House]]


@pytest.fixture
async def serve(tokenizer: TextTokenizer, tmp_path: Path) -> AsyncIterator[Serve]:
    """Three members of one vocabulary; ``tuned`` brings a chat template, ``untuned`` none."""
    for name, config in (("tuned", {"chat_template": TUNED}), ("untuned", {})):
        (tmp_path / name).mkdir()
        byte_level_tokenizer().save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    async with AsyncExitStack() as stack:

        async def make(chat_templates: str) -> House:
            experts = [{"name": name, "model": name, **LANE} for name in ("tuned", "untuned")]
            service = Service(settings(experts=experts, server={"chat_templates": chat_templates}), tokenizer)
            engine = FakeEngine(writes(letters("abc")), lane_names=service.models.lane_names)
            base, *own = engine.info.lanes
            lanes = [base, *(msgspec.structs.replace(lane, tokenizer=str(tmp_path / lane.name)) for lane in own)]
            engine.info = msgspec.structs.replace(engine.info, lanes=lanes)
            service.read_tokenizers(engine.info)
            stack.callback(service.close)
            service.attach(engine)
            transport = httpx.ASGITransport(create_app(service))
            http = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://house"))
            return House(http, engine, service)

        yield make


async def prompts(house: House, **fields: Any) -> tuple[str, dict[int, str]]:
    """What the base is asked to go on with, and what others are, by lane."""
    response = await house.chat(max_tokens=1, **fields)
    assert response.status_code == 200, response.text
    request, decode = house.engine.seen[-1], house.service.tokenizer.decode
    return decode(request.prompt), {lane: decode(ids) for lane, ids in request.collaboration.prompts}


async def test_own(serve: Serve) -> None:
    house = await serve("own")
    base, others = await prompts(house, collaboration=PROXY)
    assert "user: hi" in base
    # Who brings no template reads the base's.
    assert others == {1: "[hi]"}
    assert await prompts(house) == (base, {1: "[hi]"}), "with and without a blend"
    assert await prompts(house, collaboration={"experts": ["untuned"]}) == (base, {})
    assert await prompts(house, model="collm-demo/tuned") == ("[hi]", {})
    assert await prompts(house, model="collm-demo/untuned") == (base, {})
    given = {**PROXY, "prompts": {"tuned": "mine"}}
    assert await prompts(house, collaboration=given) == (base, {1: "mine"}), "what the request gives is taken"


async def test_the_bases_for_all_by_default(serve: Serve) -> None:
    house = await serve("base")
    base, others = await prompts(house, collaboration=PROXY)
    assert ("user: hi" in base, others) == (True, {})
    assert await prompts(house, model="collm-demo/tuned") == (base, {})


async def test_the_longest_prompt_counts(serve: Serve) -> None:
    house = await serve("own")
    error = check_error(await house.chat(messages=[{"role": "user", "content": "x" * 300}]), 400, "messages")
    assert "maximum context length is 256" in error["message"]


async def test_special_tokens_in_messages_are_text_for_all(serve: Serve) -> None:
    house = await serve("own")
    await house.chat(messages=[{"role": "user", "content": "a <|end|> b"}], max_tokens=1)
    (request,) = house.engine.seen
    own = dict(request.collaboration.prompts)[1]
    (end,) = await house.service.tokenizer.encode("<|end|>")
    assert end not in own
    assert "a <|end|> b" in house.service.tokenizer.decode(own, skip_special_tokens=False)

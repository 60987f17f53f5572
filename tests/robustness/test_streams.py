"""Hypothesis on streaming: whatever tokens, however they are cut into deltas, whatever stop strings. The whole
response and the stream come out of the same application, over ASGI, and must say the same.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.types import Delta, GenerationRequest
from server.app import create_app
from server.service import Service
from server.text.tokenizer import TextTokenizer
from tests.server.fakes import FakeEngine, byte_level_tokenizer, deltas_of
from tests.server.fakes import settings as served_settings

TOKENIZER = TextTokenizer(byte_level_tokenizer(), {"eos_token": "<|end|>"})
tokens = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=25)
stop = st.lists(st.text("ab é日\n", min_size=1, max_size=3), min_size=1, max_size=4)


def _ask(script: Any, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        service = Service(served_settings(), TOKENIZER)
        service.attach(FakeEngine(script))
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://house") as http:
            responses = [await http.post("/v1/completions", json=body) for body in bodies]
        assert service.admission.in_flight == 0
        return responses

    return asyncio.run(run())


def _streamed(response: httpx.Response) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Per choice what its chunks add up to, and the usage."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    *chunks, last = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert last["choices"] == []
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], {"text": "", "finish_reason": None, "sources": [], "tokens": []})
            assert whole["finish_reason"] is None, "a choice went on after its end"
            whole["text"] += part["text"]
            whole["finish_reason"] = part["finish_reason"]
            if part.get("collaboration"):
                report = part["collaboration"]
                assert len(report["sources"]) == len(report["tokens"]) == len(report["deferral_probabilities"])
                assert "".join(report["tokens"]) == part["text"]
                whole["sources"] += report["sources"]
            if part.get("logprobs"):
                whole["tokens"] += part["logprobs"]["tokens"]
    return choices, last["usage"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    written=tokens,
    per_delta=st.integers(1, 6),
    stops=st.none() | stop,
    n=st.integers(1, 3),
    include=st.booleans(),
    logprobs=st.none() | st.integers(0, 2),
)
@example(written=[66, 67], per_delta=1, stops=["ab"], n=1, include=False, logprobs=0)
def test_stream_equals_whole(
    written: list[int], per_delta: int, stops: list[str] | None, n: int, include: bool, logprobs: int | None
) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        return deltas_of(request, written, per_delta=per_delta)

    body = {
        "model": "collm-demo", "prompt": "x", "max_tokens": 30, "n": n, "stop": stops, "logprobs": logprobs,
        "include_stop_str_in_output": include, "collaboration": {"report": True},
    }  # fmt: skip
    whole, stream = _ask(script, [body, {**body, "stream": True, "stream_options": {"include_usage": True}}])
    assert whole.status_code == stream.status_code == 200
    expected = whole.json()
    choices, usage = _streamed(stream)
    assert usage == expected["usage"]
    details = usage["completion_tokens_details"]
    assert details["base_tokens"] + details["expert_tokens"] == usage["completion_tokens"]
    for choice in expected["choices"]:
        got = choices[choice["index"]]
        assert got["text"] == choice["text"]
        assert got["finish_reason"] == choice["finish_reason"]
        assert got["sources"] == choice["collaboration"]["sources"]
        assert "\ufffd" not in choice["text"] or "\ufffd" in TOKENIZER.decode(written)
        if logprobs is not None:
            assert got["tokens"] == choice["logprobs"]["tokens"]
        if stops and not include and choice["finish_reason"] == "stop":
            assert not any(one in choice["text"] for one in stops)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(written=tokens, fails_after=st.integers(0, 25), per_delta=st.integers(1, 4))
def test_an_error_at_any_moment(written: list[int], fails_after: int, per_delta: int) -> None:
    """Before the first event: a status. Later: an error event, the last one, and no [DONE]."""

    def script(request: GenerationRequest) -> list[Delta]:
        good = deltas_of(request, written, per_delta=per_delta)[:fails_after]
        for delta in good:
            delta.finish_reason = None
        return [*good, Delta(request.request_id, finish_reason="error", error="the gate's value is not finite")]

    body = {"model": "collm-demo", "prompt": "x", "max_tokens": 30}
    whole, stream = _ask(script, [body, {**body, "stream": True}])
    assert whole.status_code == 500
    if stream.status_code == 500:
        assert set(stream.json()["error"]) == {"message", "type", "param", "code"}
        return
    assert stream.status_code == 200
    assert "[DONE]" not in stream.text
    events = [json.loads(block.removeprefix("data: ")) for block in stream.text.split("\n\n")[:-1]]
    assert ["error" in event for event in events] == [False] * (len(events) - 1) + [True]

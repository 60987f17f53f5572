from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from engine.errors import EngineDeadError
from engine.types import Delta, ErrorCode, GenerationRequest
from server.text.tokenizer import TextTokenizer
from tests.server.conftest import Build, House
from tests.server.fakes import A, check_error, deltas_of, events, waits_forever, writes

TEXT = "Hello 日本語, naïve 😀 world"


def text_of(chunks: list[Any], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


@pytest.mark.parametrize("per_delta", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"stop": ["world", "w"]},
        {"stop": "語, n"},
        {"echo": True, "logprobs": 1},
        {"logprobs": 0, "return_token_ids": True},
        {"stop": "naïve", "include_stop_str_in_output": True, "logprobs": 3},
    ],
)
async def test_a_stream_joined_is_the_whole_response(
    build: Build, tokenizer: TextTokenizer, per_delta: int, extra: dict[str, Any]
) -> None:
    tokens = [token for char in TEXT for token in tokenizer._encode(char, True)]
    house = await build(writes(tokens, per_delta=per_delta))
    fields = {"max_tokens": 100, "collaboration": {"report": True}, **extra}
    whole = (await house.complete(**fields)).json()
    response = await house.complete(stream=True, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    expected = whole["choices"][0]
    assert text_of(chunks) == expected["text"]
    assert "\ufffd" not in response.text
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [expected["finish_reason"]]
    for field in ("collaboration", "logprobs"):
        if expected[field] is None:
            continue
        for name, values in expected[field].items():
            assert [v for chunk in chunks for v in chunk["choices"][0][field][name]] == values, name
    if extra.get("return_token_ids"):
        assert [v for chunk in chunks for v in chunk["choices"][0]["token_ids"]] == expected["token_ids"]
        assert chunks[0]["choices"][0]["prompt_token_ids"] == expected["prompt_token_ids"]
        assert all("prompt_token_ids" not in chunk["choices"][0] for chunk in chunks[1:])
    if not extra.get("echo"):
        for chunk in chunks:
            choice = chunk["choices"][0]
            assert "".join(choice["collaboration"]["tokens"]) == choice["text"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_last_and_on_request(house: House) -> None:
    whole = (await house.complete(max_tokens=5)).json()
    response = await house.complete(max_tokens=5, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]


async def test_continuous_usage_grows_with_every_chunk(house: House) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await house.complete(max_tokens=5, stream=True, stream_options=options)
    *chunks, usage, _ = events(response.text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5]
    assert usage["usage"] == chunks[-1]["usage"]


async def test_several_choices_and_prompts_in_one_stream(build: Build) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        index = int(request.request_id.rsplit("-", 1)[1])
        return deltas_of(request, [A + index] * (3 + index))

    house = await build(script)
    response = await house.complete(prompt=["a", "b"], n=2, stream=True)
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    whole = (await house.complete(prompt=["a", "b"], n=2)).json()
    for choice in whole["choices"]:
        index = choice["index"]
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]


async def test_an_error_before_the_first_event_has_its_own_status(build: Build) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        late = "the expert is late"
        return [Delta(request.request_id, finish_reason="error", error=late, code=ErrorCode.STEP_TIMEOUT)]

    house = await build(script)
    error = check_error(await house.complete(stream=True), 504)
    assert error["code"] == "step_timeout"


@pytest.mark.parametrize("n", [1, 2])
async def test_an_error_in_the_stream_is_an_event_and_ends_it(build: Build, n: int) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Delta]:
        yield Delta(request.request_id, [A], [0], [None])
        await asyncio.sleep(0)
        raise EngineDeadError("the engine process ended with status -9")

    house = await build(script)
    *chunks, last = events((await house.complete(stream=True, n=n)).text)
    assert chunks
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["code"] == "engine_dead"
    assert house.service.admission.in_flight == 0
    assert await house.metric("collm_requests_total", model_name="collm-demo", outcome="error") >= 1


@pytest.mark.parametrize("n", [1, 2])
async def test_a_wait_torn_down_with_a_dead_engine_is_an_error_not_a_cancellation(build: Build, n: int) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Delta]:
        yield Delta(request.request_id, [A], [0], [None])
        house.engine.alive = False
        raise asyncio.CancelledError

    house = await build(script)
    assert check_error(await house.complete(n=n), 500)["code"] == "engine_dead"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_aborts_what_it_asked_for(build: Build, stream: bool, n: int) -> None:
    house = await build(waits_forever)
    request = asyncio.create_task(house.complete(stream=stream, n=n, max_tokens=50))
    while len(house.engine.seen) < n:
        await asyncio.sleep(0)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert len(house.engine.closed_early) == n
    assert house.service.admission.in_flight == 0
    assert await house.metric("collm_requests_total", model_name="collm-demo", outcome="aborted") == n


async def test_a_disconnect_is_noticed_while_nothing_is_sent(build: Build) -> None:
    """As uvicorn tells it: by a message, while the engine is silent."""
    from server.app import create_app

    house = await build(waits_forever)
    app = create_app(house.service)
    for stream in (b"true", b"false"):
        gone = asyncio.Event()
        body = b'{"model": "collm-demo", "prompt": "a", "stream": ' + stream + b"}"
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive(messages: list[Any] = messages, gone: asyncio.Event = gone) -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        sent: list[Any] = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "", "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        before = len(house.engine.closed_early)
        task = asyncio.create_task(app(scope, receive, send))
        while len(house.engine.seen) == before or (stream == b"true" and len(sent) < 2):
            assert not task.done()
            await asyncio.sleep(0)
        assert len(house.engine.closed_early) == before
        gone.set()
        await asyncio.wait_for(task, 30)
        assert len(house.engine.closed_early) == before + 1
        assert bool(sent) == (stream == b"true")


async def test_the_openai_client_streams(house: House) -> None:
    client = openai.AsyncOpenAI(base_url="http://house/v1", api_key="none", http_client=house.http)
    stream = await client.completions.create(
        model="collm-demo",
        prompt="Hello",
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"collaboration": {"policy": "always", "report": True}},
    )
    chunks = [chunk async for chunk in stream]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 4
    assert sum(len(c.choices[0].collaboration["sources"]) for c in chunks[:-1]) == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("route", ["completions", "chat"])
async def test_no_character_of_an_event_ends_a_line_for_anybody(
    build: Build, tokenizer: TextTokenizer, route: str
) -> None:
    """httpx's iter_lines, as str.splitlines, ends lines at more characters than the standard of event streams does."""
    text = "one\u2028two\u2029three\x85four\x0b\x0c\x1c\x1d\x1e\r\n日"
    message = "what\u2028failed\x85here"

    async def script(request: GenerationRequest) -> AsyncIterator[Delta]:
        for delta in deltas_of(request, tokenizer._encode(text, False)):
            delta.finish_reason = None
            yield delta
        yield Delta(request.request_id, finish_reason="error", error=message, code=ErrorCode.LANE_FAILURE)

    house = await build(script)
    fields = {"stream": True, "logprobs": 1 if route == "completions" else True, "collaboration": {"report": True}}
    send = house.complete if route == "completions" else house.chat
    response = await send(max_tokens=100, **fields)
    lines = list(response.iter_lines())
    assert lines == response.text.split("\n")[:-1]
    *chunks, failure = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert failure["error"]["message"] == message
    written = "".join(
        choice["text"] if route == "completions" else choice["delta"].get("content", "")
        for chunk in chunks
        for choice in chunk["choices"]
    )
    assert written == text
    reported = [token for chunk in chunks for choice in chunk["choices"] for token in choice["collaboration"]["tokens"]]
    assert "".join(reported) == text

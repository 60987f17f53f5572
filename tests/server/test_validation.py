"""Bad input, as a table: every row is answered 400 and names its field, and the server goes on."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.server.conftest import Build, House
from tests.server.fakes import check_error

COMMON: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a"] * 257}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [512]}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": -1000}}, "logit_bias"),
    ({"logit_bias": {"1": "x"}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"frequency": 1}}, "stream_options.frequency"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"user": 3}, "user"),
    ({"model": 3}, "model"),
    ({"model": None}, "model"),
    ({"return_token_ids": "no"}, "return_token_ids"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {f"{number}": "" for number in range(17)}}, "metadata"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"priority": 1}, "priority"),
    ({"priority": False}, "priority"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"kv_transfer_params": {}}, "kv_transfer_params"),
    ({"repetition_detection": {}}, "repetition_detection"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [512]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
    ({"allowed_token_ids": [0], "min_tokens": 1}, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "response_format": {"type": "json_object"}}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words[0]"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"bad_words": "no"}, "bad_words"),
    ({"bad_words": ["a"], "structured_outputs": {"regex": "b"}}, "bad_words"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"skip_special_tokens": False, "spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens"),
    ({"truncation_side": "left"}, "truncation_side"),
    ({"truncate_prompt_tokens": 5, "truncation_side": "up"}, "truncation_side"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"request_id": "a b"}, "request_id"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": ""}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": [{}]}}, "structured_outputs.json"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"collaboration": []}, "collaboration"),
    ({"collaboration": {"policy": "sometimes"}}, "collaboration.policy"),
    ({"collaboration": {"threshold": 2}}, "collaboration.threshold"),
    ({"collaboration": {"threshold": -0.1}}, "collaboration.threshold"),
    ({"collaboration": {"rate": 1.1}}, "collaboration.rate"),
    ({"collaboration": {"rate": 0.5}}, "collaboration.rate"),
    ({"collaboration": {"rate": 0.5, "policy": "always"}}, "collaboration.rate"),
    ({"collaboration": {"threshold": 0.5, "policy": "random"}}, "collaboration.threshold"),
    ({"collaboration": {"threshold": 0, "policy": "never"}}, "collaboration.threshold"),
    ({"collaboration": {"max_expert_tokens": -1}}, "collaboration.max_expert_tokens"),
    ({"collaboration": {"run_ahead": "on"}}, "collaboration.run_ahead"),
    ({"collaboration": {"run_ahead": 0}}, "collaboration.run_ahead"),
    ({"collaboration": {"run_ahead": 65}}, "collaboration.run_ahead"),
    ({"collaboration": {"run_ahead": 1.5}}, "collaboration.run_ahead"),
    ({"collaboration": {"run_ahead": True}}, "collaboration.run_ahead"),
    ({"model": "collm-demo/codes", "collaboration": {"run_ahead": 2}}, "collaboration.run_ahead"),
    ({"collaboration": {"experts": "codes"}}, "collaboration.experts"),
    ({"collaboration": {"experts": ["nobody"]}}, "collaboration.experts"),
    ({"collaboration": {"experts": ["base"]}}, "collaboration.experts"),
    ({"collaboration": {"experts": ["codes", "codes"]}}, "collaboration.experts"),
    ({"collaboration": {"report": 1}}, "collaboration.report"),
    ({"collaboration": {"poilcy": "never"}}, "collaboration.poilcy"),
    ({"model": "collm-demo/base", "collaboration": {"policy": "never"}}, "collaboration.policy"),
    ({"model": "collm-demo/codes", "collaboration": {"threshold": 0.5}}, "collaboration.threshold"),
]

COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": [1] * 256}, "prompt"),
    ({"prompt": "word " * 400}, "prompt"),
    ({"prompt": [1] * 250, "max_tokens": 7}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "abc"}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 16.0}, "max_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"prompt": [1] * 250, "min_tokens": 7}, "min_tokens"),
    ({"prompt": [1] * 250, "min_tokens": 7, "structured_outputs": {"regex": "a"}}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 21, "stream": True}, "logprobs"),
    ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"logprobs": -2}, "logprobs"),
    ({"logprobs": "a"}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "x"}, "echo"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 21}, "best_of"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"suffix": "the end"}, "suffix"),
    ({"messages": []}, "messages"),
]

CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "developer", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 300}, "max_tokens"),
    ({"max_completion_tokens": 300}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    ({"max_completion_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"min_tokens": 256}, "min_tokens"),
    ({"min_tokens": 10**6, "response_format": {"type": "json_object"}}, "min_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tools": [{}], "tool_choice": "required", "parallel_tool_calls": True, "strict": True}, "tools"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"verbosity": "low"}, "verbosity"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"prompt": "x"}, "prompt"),
    ({"echo": True}, "echo"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
]


def name(value: object) -> str:
    return repr(value)[:60]


@pytest.mark.parametrize(("fields", "param"), COMMON + COMPLETIONS, ids=name)
@pytest.mark.parametrize("stream", [False, True])
async def test_completions(house: House, fields: dict[str, Any], param: str, stream: bool) -> None:
    body = {"stream": True, **fields} if stream and "stream_options" not in fields else fields
    error = check_error(await house.complete(**body), 400, param)
    assert error["type"] == "invalid_request_error"
    assert house.engine.seen == []
    assert house.service.admission.in_flight == 0
    assert (await house.complete(max_tokens=1)).status_code == 200


@pytest.mark.parametrize(("fields", "param"), COMMON + CHAT, ids=name)
async def test_chat(house: House, fields: dict[str, Any], param: str) -> None:
    check_error(await house.chat(**fields), 400, param)
    assert house.engine.seen == []
    assert (await house.chat(max_tokens=1)).status_code == 200


ASK_NOTHING: list[dict[str, Any]] = [
    {"stop": []},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": ["x"] * 16},
    {"store": False},
    {"metadata": {}},
    {"metadata": {"run": "7"}},
    {"service_tier": "auto"},
    {"prompt_cache_key": "mine", "safety_identifier": "user-1", "user": "user-1", "session_id": "s"},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
    {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "best_of": 1},
    {"priority": 0, "cache_salt": "salt", "vllm_xargs": {}, "watermarking": None, "stream_interval": 1},
    {"skip_special_tokens": True, "spaces_between_special_tokens": False},
    {"bad_words": [], "allowed_token_ids": None, "logit_bias": {}, "stop_token_ids": []},
    {"response_format": {"type": "text"}},
]


@pytest.mark.parametrize("fields", ASK_NOTHING, ids=name)
async def test_fields_that_ask_nothing(house: House, fields: dict[str, Any]) -> None:
    """What client libraries send by default changes nothing: the engine is asked the same as without."""
    chat = {key: value for key, value in fields.items() if key != "best_of"}
    assert (await house.complete(**fields)).status_code == 200
    assert (await house.complete(stream=bool(fields.get("stream")))).status_code == 200
    assert (await house.chat(**chat)).status_code == 200
    assert (await house.chat(stream=bool(fields.get("stream")))).status_code == 200
    first, plain, chatted, plain_chat = (
        msgspec.structs.replace(seen.sampling, cache_salt=None) for seen in house.engine.seen
    )
    assert first == plain
    assert chatted == plain_chat


@pytest.mark.parametrize(
    "fields",
    [
        {"parallel_tool_calls": True, "tool_choice": "none", "tools": []},
        {"tool_choice": "auto", "functions": [], "function_call": "none"},
        {"modalities": ["text"], "verbosity": "medium", "reasoning_effort": "none"},
        {"top_logprobs": 0},
        {"echo": False, "include_reasoning": True, "documents": [], "chat_template_kwargs": {}},
        {"add_special_tokens": False, "add_generation_prompt": True, "continue_final_message": False},
    ],
    ids=name,
)
async def test_chat_fields_that_ask_nothing(house: House, fields: dict[str, Any]) -> None:
    assert (await house.chat(**fields)).status_code == 200
    assert (await house.chat()).status_code == 200
    assert house.engine.seen[0].prompt == house.engine.seen[1].prompt
    assert house.engine.seen[0].sampling == house.engine.seen[1].sampling


async def test_an_empty_suffix_asks_nothing(house: House) -> None:
    assert (await house.complete(suffix="")).status_code == 200


@pytest.mark.parametrize(
    "message",
    [
        {"annotations": [], "tool_calls": [], "refusal": None, "audio": None, "function_call": None},
        {"reasoning": None, "reasoning_content": None, "tool_calls": None, "provider_specific_fields": None},
        {"name": "helper"},
    ],
    ids=name,
)
@pytest.mark.parametrize("content", ["an answer", None])
async def test_history_as_it_was_returned(house: House, message: dict[str, Any], content: str | None) -> None:
    history = [{"role": "assistant", "content": content, **message}, {"role": "user", "content": "go on"}]
    assert (await house.chat(messages=history)).status_code == 200
    plain = [{"role": "assistant", "content": content or ""}, {"role": "user", "content": "go on"}]
    assert (await house.chat(messages=plain)).status_code == 200
    assert house.engine.seen[0].prompt == house.engine.seen[1].prompt


async def test_history_with_tool_calls_is_refused_by_name(house: House) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    check_error(await house.chat(messages=[message]), 400, "messages[0].tool_calls")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1] * 256},
        {"prompt": [1] * 250, "max_tokens": 7},
        {"prompt": "word " * 400},
        {"prompt": "a " * 500_000},
    ],
    ids=name,
)
async def test_overflow_in_the_words_that_clients_look_for(house: House, fields: dict[str, Any]) -> None:
    error = check_error(await house.complete(**fields), 400)
    assert "maximum context length is 256 tokens" in error["message"]
    assert error["code"] == "context_length_exceeded"


async def test_how_many_stop_strings_is_a_setting(build: Build) -> None:
    house = await build(server={"max_stop_strings": 40})
    assert (await house.complete(stop=[f"<{number}>" for number in range(40)])).status_code == 200
    error = check_error(await house.complete(stop=["<"] * 41), 400, "stop")
    assert "server.max_stop_strings" in error["message"]


@pytest.mark.parametrize("field", ["model", "prompt"])
async def test_missing_fields(house: House, field: str) -> None:
    body = {"model": "collm-demo", "prompt": "a"}
    del body[field]
    error = check_error(await house.http.post("/v1/completions", json=body), 400, field)
    assert error["code"] == "missing_field"


async def test_null_means_not_given(house: House) -> None:
    fields = [
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "suffix",
        "logit_bias",
        "best_of",
        "stream",
        "user",
        "metadata",
    ]
    response = await house.complete(**dict.fromkeys(fields), collaboration={"policy": None, "experts": None})
    assert response.status_code == 200, response.text


async def test_a_member_takes_null_for_not_given(house: House) -> None:
    response = await house.complete(model="collm-demo/base", collaboration={"policy": None, "report": True})
    assert response.status_code == 200, response.text


GOOD = b'{"model": "collm-demo", "prompt": "a", "temperature": 1}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"{",
        GOOD[:-1],
        GOOD + b"x",
        GOOD.replace(b'"a"', b'"\xff"'),
        GOOD.replace(b'"a"', rb'"\ud800"'),
        GOOD.replace(b'"a"', rb'"\udc00 x"'),
        GOOD.replace(b": 1}", b": NaN}"),
        GOOD.replace(b": 1}", b": Infinity}"),
        GOOD.replace(b": 1}", b": -Infinity}"),
        GOOD.replace(b": 1}", b": 1e999}"),
        GOOD.replace(b": 1}", b": " + b"9" * 5000 + b"}"),
        GOOD.replace(b'"a"', b"[" * 100_000),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\x00",
    ],
    ids=name,
)
async def test_bodies_that_are_no_request(house: House, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        check_error(await house.http.post(path, content=body, headers=headers), 400)
    good = await house.http.post("/v1/completions", content=GOOD, headers=headers)
    assert good.status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "x"]
)
async def test_other_content_types(house: House, content_type: str) -> None:
    check_error(await house.http.post("/v1/completions", content=GOOD, headers={"Content-Type": content_type}), 415)


async def test_no_content_type(house: House) -> None:
    """A program may leave it out. A page may not: it would get around the browser's question (CORS)."""
    request = house.http.build_request("POST", "/v1/completions", content=GOOD)
    assert "content-type" not in request.headers
    assert (await house.http.send(request)).status_code == 200
    for origin in ("https://page.example", "null"):
        request = house.http.build_request("POST", "/v1/completions", content=GOOD, headers={"Origin": origin})
        assert check_error(await house.http.send(request), 415)["code"] == "unsupported_media_type"
        headers = {"Origin": origin, "Content-Type": "application/json"}
        assert (await house.http.post("/v1/completions", content=GOOD, headers=headers)).status_code == 200


async def test_errors_do_not_echo_what_was_sent(house: House) -> None:
    secret = "s3cret" * 1000
    for fields in (
        {"model": secret},
        {secret: 1},
        {"collaboration": {"experts": [secret]}},
        {"logit_bias": {secret: 1}},
        {"collaboration": {"policy": secret}},
    ):
        response = await house.complete(**fields)
        assert response.status_code in (400, 404)
        assert len(response.text) < 600
    response = await house.complete(model="a\r\nb\x1b[31m")
    message = check_error(response, 404, "model")["message"]
    assert message.isprintable()


async def test_a_prompt_that_cannot_fit_is_not_even_tokenised(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def encode(*_: object, **__: object) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(house.service.tokenizer, "encode", encode)
    error = check_error(await house.complete(prompt="a " * 500_000), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    check_error(await house.chat(messages=[{"role": "user", "content": "a " * 500_000}]), 400, "messages")


async def test_more_generations_than_the_server_takes_at_once(build: Build) -> None:
    house = await build(scheduler={"max_num_seqs": 2}, server={"max_queued_requests": 3})
    check_error(await house.complete(n=6), 400, "n")
    check_error(await house.complete(prompt=["a"] * 6), 400, "prompt")
    assert (await house.complete(n=5)).status_code == 200

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.types import Collaboration, Delta, ErrorCode, GenerationRequest, StructuredOutputs
from server.meters import OUTCOMES
from server.sampling import derived_seed
from server.text.tokenizer import TextTokenizer
from tests.server.conftest import Build, House
from tests.server.fakes import A, Script, check_error, deltas_of, events, writes


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer._encode(text, True)


async def test_the_shape_of_a_response(house: House, tokenizer: TextTokenizer) -> None:
    response = await house.complete(max_tokens=4)
    assert response.status_code == 200
    body = response.json()
    prompt_tokens = len(ids(tokenizer, "Hello"))
    assert set(body) == {"id", "object", "created", "model", "choices", "system_fingerprint", "usage"}
    assert body["object"] == "text_completion"
    assert body["model"] == "collm-demo"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"text": "abcd", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 4,
        "total_tokens": prompt_tokens + 4,
        "completion_tokens_details": {"base_tokens": 2, "expert_tokens": 2},
        "prompt_tokens_details": {"cached_tokens": 0},
        "collaboration": {
            "by_source": {
                "base": {"tokens": 2, "prompt_tokens": 0, "seconds": 0.0},
                "codes": {"tokens": 2, "prompt_tokens": 0, "seconds": 0.0},
            },
            "queue_seconds": 0.0,
        },
    }


async def test_defaults_are_the_contract_s(house: House) -> None:
    await house.complete()
    request = house.engine.seen[0]
    assert request.collaboration == Collaboration()
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)
    assert sampling.seed is None
    assert sampling.logprobs is None


async def test_sampling_fields_reach_the_engine(house: House) -> None:
    response = await house.complete(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-(2**63), presence_penalty=1,
        frequency_penalty=-2, repetition_penalty=1.5, logit_bias={"5": -100, "7": 3}, stop_token_ids=[3, 4],
        ignore_eos=True, min_tokens=2, user="u",
    )  # fmt: skip
    assert response.status_code == 200
    sampling = house.engine.seen[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        9,
        0.5,
        0.9,
        0,
        0.1,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -2, 1.5)
    assert sampling.logit_bias == {5: -100, 7: 3}
    assert sampling.stop_token_ids == (3, 4)
    assert (sampling.seed, sampling.ignore_eos, sampling.min_tokens) == (-(2**63), True, 2)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Hello", ["Hello"]),
        (["Hello", "def"], ["Hello", "def"]),
        ([72, 73], [[72, 73]]),
        ([[72], [73, 74]], [[72], [73, 74]]),
    ],
)
async def test_all_prompt_forms(
    house: House, tokenizer: TextTokenizer, prompt: object, texts: list[str | list[int]]
) -> None:
    response = await house.complete(prompt=prompt, max_tokens=2)
    expected = [ids(tokenizer, text) if isinstance(text, str) else text for text in texts]
    assert [request.prompt for request in house.engine.seen] == expected
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(texts)))
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_n_choices_of_each_prompt_have_derived_seeds(house: House) -> None:
    response = await house.complete(prompt=["a", "b"], n=3, seed=7, max_tokens=1)
    body = response.json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    seeds = [request.sampling.seed for request in house.engine.seen]
    # The same prompt alone has the same seeds: a request is reproducible alone and in a batch.
    assert seeds[:3] == seeds[3:] == [7, derived_seed(7, 1), derived_seed(7, 2)]
    assert len({request.request_id for request in house.engine.seen}) == 6
    assert body["usage"]["completion_tokens"] == 6


def test_derived_seeds_are_int64_and_differ() -> None:
    seeds = {derived_seed(seed, index) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for index in range(1, 128)}
    assert len(seeds) == 5 * 127
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_best_of_returns_the_highest_mean_logprob(build: Build) -> None:
    # Candidate i writes the token A + i; candidate 2 is the most probable, then 0.
    scores = [-2.0, -3.0, -1.0]

    def script(request: GenerationRequest) -> list[Delta]:
        index = int(request.request_id.rsplit("-", 1)[1])
        deltas = deltas_of(request, [A + index] * 2)
        for delta in deltas:
            assert delta.logprobs is not None
            delta.logprobs[0].logprobs[0] = scores[index]
        return deltas

    house = await build(script)
    body = (await house.complete(best_of=3, n=2, max_tokens=2, return_token_ids=True)).json()
    assert [choice["token_ids"][0] for choice in body["choices"]] == [A + 2, A]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    # Logprobs were needed, not asked for. All candidates were written, and count.
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 6


async def test_logprobs_in_the_legacy_format(build: Build, tokenizer: TextTokenizer) -> None:
    tokens = ids(tokenizer, "Hello wor")
    house = await build(writes(tokens))
    body = (await house.complete(logprobs=2, max_tokens=len(tokens))).json()
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "Hello wor"
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(logprobs["tokens"]) == "Hello wor"
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(len(tokens))]
    assert logprobs["token_logprobs"] == [-0.25] * len(tokens)
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.25
        assert 1 <= len(top) <= 3


async def test_minus_infinity_is_sent_as_a_number(build: Build) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        deltas = deltas_of(request, [A])
        assert deltas[0].logprobs is not None
        deltas[0].logprobs[0].logprobs[:] = [float("-inf")] * 2
        return deltas

    house = await build(script)
    body = (await house.complete(logprobs=1, max_tokens=1)).json()
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


async def test_echo_with_logprobs(house: House) -> None:
    response = await house.complete(prompt="Hello there", echo=True, logprobs=1, max_tokens=2)
    request = house.engine.seen[0]
    assert request.sampling.prompt_logprobs == 1
    choice = response.json()["choices"][0]
    assert choice["text"] == "Hello thereab"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    offsets = [len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    assert logprobs["text_offset"] == offsets


async def test_echo_alone_needs_no_engine(house: House) -> None:
    body = (await house.complete(prompt=["Hello", "été"], echo=True, max_tokens=0, n=2)).json()
    assert [choice["text"] for choice in body["choices"]] == ["Hello", "Hello", "été", "été"]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 0
    assert house.engine.seen == []


async def test_echo_of_logprobs_alone_drops_the_token_the_engine_must_write(house: House) -> None:
    body = (await house.complete(prompt="Hello there", echo=True, max_tokens=0, logprobs=1)).json()
    assert house.engine.seen[0].sampling.max_tokens == 1
    choice = body["choices"][0]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "Hello there"
    assert body["usage"]["completion_tokens"] == 0
    assert await house.total("collm_tokens_total", model_name="collm-demo", source="base") == 0


async def test_echo_of_token_ids_returns_their_text(house: House, tokenizer: TextTokenizer) -> None:
    prompt = ids(tokenizer, "naïve 日本")
    body = (await house.complete(prompt=prompt, echo=True, max_tokens=1, return_token_ids=True)).json()
    assert body["choices"][0]["text"].startswith("naïve 日本")
    assert body["choices"][0]["prompt_token_ids"] == prompt
    assert body["choices"][0]["token_ids"] == [A]


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_across_tokens_and_sources(build: Build, tokenizer: TextTokenizer, include: bool) -> None:
    tokens = ids(tokenizer, "one STOP two three")
    house = await build(writes(tokens))
    body = (await house.complete(stop=["nothing", "STOP"], max_tokens=50, include_stop_str_in_output=include)).json()
    choice = body["choices"][0]
    assert choice["text"] == ("one STOP" if include else "one ")
    assert choice["finish_reason"] == "stop"
    # The engine was told to stop, and what it wrote beyond the stop string is not counted.
    assert house.engine.closed_early == [house.engine.seen[0].request_id]
    assert body["usage"]["completion_tokens"] == len(ids(tokenizer, "one STOP"))
    assert await house.metric("collm_requests_total", model_name="collm-demo", outcome="stop") == 1


async def test_a_stop_string_within_one_delta_drops_later_tokens(build: Build, tokenizer: TextTokenizer) -> None:
    tokens = ids(tokenizer, "one STOP two three")
    house = await build(writes(tokens, per_delta=100))
    body = (await house.complete(stop="STOP", max_tokens=50, collaboration={"report": True}, logprobs=0)).json()
    choice = body["choices"][0]
    count = len(ids(tokenizer, "one STOP"))
    assert choice["text"] == "one " == "".join(choice["collaboration"]["tokens"])
    assert {len(values) for values in choice["collaboration"].values()} == {count}
    assert {len(values) for values in choice["logprobs"].values()} == {count}
    assert body["usage"]["completion_tokens"] == count


async def test_report_names_who_wrote_what(house: House) -> None:
    body = (await house.complete(max_tokens=3, collaboration={"report": True})).json()
    choice = body["choices"][0]
    assert choice["collaboration"]["sources"] == ["base", "codes", "base"]
    assert choice["collaboration"]["deferral_probabilities"] == [0.25, 0.75, 0.25]
    assert "".join(choice["collaboration"]["tokens"]) == choice["text"]


async def test_without_report_there_is_none(house: House) -> None:
    body = (await house.complete(max_tokens=3, collaboration={"policy": "always"})).json()
    assert "collaboration" not in body["choices"][0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Collaboration()),
        ({"policy": "never"}, Collaboration(policy="never")),
        ({"policy": "random"}, Collaboration(policy="random", rate=0.5)),
        ({"policy": "random", "rate": 0.1}, Collaboration(policy="random", rate=0.1)),
        ({"threshold": 0, "max_expert_tokens": 0}, Collaboration(threshold=0.0, max_expert_tokens=0)),
        ({"run_ahead": "off"}, Collaboration(run_ahead="off")),
        ({"run_ahead": 3}, Collaboration(run_ahead=3)),
        ({"experts": ["codes"], "policy": "confidence"}, Collaboration(policy="confidence", experts=(1,))),
    ],
)
async def test_collaboration_reaches_the_engine(house: House, given: object, expected: Collaboration) -> None:
    response = await house.complete(collaboration=given)
    assert response.status_code == 200, response.text
    assert house.engine.seen[0].collaboration == expected


@pytest.mark.parametrize(("name", "lane", "details"), [("base", 0, (4, 0)), ("codes", 1, (0, 4))])
async def test_a_member_alone(house: House, name: str, lane: int, details: tuple[int, int]) -> None:
    body = (await house.complete(model=f"collm-demo/{name}", max_tokens=4, collaboration={"report": True})).json()
    assert house.engine.seen[0].collaboration == Collaboration(member=lane, looks=True)
    assert body["choices"][0]["collaboration"]["sources"] == [name] * 4
    assert body["choices"][0]["collaboration"]["deferral_probabilities"] == [None] * 4
    usage = body["usage"]["completion_tokens_details"]
    assert (usage["base_tokens"], usage["expert_tokens"]) == details


async def test_a_pair_without_a_gate_says_so(build: Build) -> None:
    house = await build(gate=False)
    refused = await house.complete(collaboration={"policy": "sample"})
    assert "never" in check_error(refused, 400, "collaboration.policy")["message"]
    assert (await house.complete()).status_code == 200  # by the base's confidence
    assert (await house.complete(collaboration={"policy": "confidence"})).status_code == 200
    assert (await house.complete(model="collm-demo/base")).status_code == 200


async def test_the_default_limit_gives_way_to_the_context(house: House) -> None:
    await house.complete(prompt=[100] * 250)
    assert house.engine.seen[0].sampling.max_tokens == 6


async def test_one_failing_choice_fails_the_request_and_aborts_the_others(build: Build) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Delta]:
        yield Delta(request.request_id, [A], [0], [None])
        if request.request_id.endswith("-1"):
            yield Delta(request.request_id, finish_reason="error", error="the gate's value is not finite")
        for _ in range(100):
            await asyncio.sleep(0)
            yield Delta(request.request_id, [A], [0], [None])
        raise AssertionError("was to be aborted")

    house = await build(script)
    error = check_error(await house.complete(n=3), 500)
    assert error["message"] == "the gate's value is not finite"
    assert len(house.engine.closed_early) == 2
    assert house.service.admission.in_flight == 0


def refuses(message: str, code: ErrorCode = ErrorCode.INVALID_REQUEST) -> Script:
    """A script of an engine that wants none of these requests."""

    def script(request: GenerationRequest) -> list[Delta]:
        return [Delta(request.request_id, finish_reason="error", error=message, refused=True, code=code)]

    return script


def schema_of(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    ("code", "fields", "param"),
    [
        (ErrorCode.INVALID_GRAMMAR, {"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        (ErrorCode.INVALID_GRAMMAR, {"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
        (ErrorCode.INVALID_GRAMMAR, schema_of({"not": {}}), "response_format.json_schema.schema"),
        (ErrorCode.INVALID_GRAMMAR, {"response_format": {"type": "json_object"}}, "response_format"),
        (ErrorCode.INVALID_REQUEST, {"structured_outputs": {"regex": "a"}}, None),
        (ErrorCode.INVALID_REQUEST, {}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_blames_the_grammar_only_for_its_own_faults(
    build: Build, code: ErrorCode, fields: dict[str, Any], param: str | None, stream: bool
) -> None:
    message = "no such thing"
    house = await build(refuses(message, code))
    for response in (await house.complete(stream=stream, **fields), await house.chat(stream=stream, **fields)):
        error = check_error(response, 400)
        expected = message if param is None else f"'{param}': {message}."
        assert (error["message"], error["param"]) == (expected, param)
        assert error["code"] == (None if param is None else "invalid_structured_output")


async def test_a_form_that_cannot_be_followed_any_further_is_the_client_s_to_mend(build: Build) -> None:
    """Some tokens are written when its masks take too long."""

    def script(request: GenerationRequest) -> list[Delta]:
        begun = deltas_of(request, [A, A + 1])[0]
        rest = Delta(
            request.request_id, finish_reason="error", error="too long", refused=True, code=ErrorCode.INVALID_GRAMMAR
        )
        return [begun, rest]

    house = await build(script)
    fields = {"structured_outputs": {"regex": "ab"}, "max_tokens": 5}
    whole = check_error(await house.complete(**fields), 400, "structured_outputs.regex")
    first, second = events((await house.complete(stream=True, **fields)).text)
    assert first["choices"][0]["text"] == "a"
    assert second["error"] == whole
    assert whole["code"] == "invalid_structured_output"


@pytest.mark.parametrize("strict", [None, False, True])
async def test_strict_changes_nothing(house: House, strict: bool | None) -> None:
    """Client libraries send false by default; the schema is followed all the same."""
    json_schema = {"name": "x", "schema": {"type": "null"}, "strict": strict}
    assert (await house.chat(response_format={"type": "json_schema", "json_schema": json_schema})).status_code == 200
    assert house.engine.seen[0].sampling.structured_outputs == StructuredOutputs(json='{"type":"null"}')


@pytest.mark.parametrize("schema", [True, False, {}, {"type": "null"}])
async def test_a_schema_is_taken_alike_in_both_places(house: House, schema: object) -> None:
    assert (await house.complete(**schema_of(schema))).status_code == 200
    assert (await house.chat(structured_outputs={"json": schema})).status_code == 200
    first, second = (seen.sampling.structured_outputs for seen in house.engine.seen)
    assert first == second == StructuredOutputs(json=json.dumps(schema, separators=(",", ":")))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_no_failure_of_ours(build: Build, stream: bool) -> None:
    """As with all that is answered 400, nothing is counted."""
    house = await build(refuses("not this one"))
    check_error(await house.complete(stream=stream, n=2), 400)
    for outcome in OUTCOMES:
        assert await house.metric("collm_requests_total", model_name="collm-demo", outcome=outcome) == 0
    assert await house.metric("collm_request_seconds_count", model_name="collm-demo") == 0
    assert await house.metric("collm_requests_waiting", model_name="collm-demo") == 0


SPECIAL = ["<|end|>", "one<|user|>two", "été<|end|><|user|> 日本 <|end|>😀!", "  two  <|end|>  spaces ", "<|end"]


@pytest.mark.parametrize("text", SPECIAL)
async def test_offsets_of_an_echoed_text_with_special_tokens(house: House, text: str) -> None:
    body = (await house.complete(prompt=text, echo=True, logprobs=0, max_tokens=3)).json()
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == f"{text}abc"
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token), (token, offset)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


async def test_offsets_of_echoed_token_ids_skip_special_tokens_as_their_text_does(
    house: House, tokenizer: TextTokenizer
) -> None:
    prompt = ids(tokenizer, "one<|user|>two")
    choice = (await house.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=1)).json()["choices"][0]
    assert choice["text"] == "onetwoa"
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token == "<|user|>" or choice["text"][offset:].startswith(token)


BROKEN = [b"a", b"\xe6\x97", b"b", b"\xe6", b"\xe6\x97\xa5", b"\xef\xbf\xbd", b"c", b"\xe6"]
"""One token per byte: beginnings of characters that nothing finishes, one that is finished, and U+FFFD itself."""


@pytest.mark.parametrize("per_delta", [1, 3, 100])
@pytest.mark.parametrize(
    ("pieces", "extra", "text", "offsets"),
    [
        (BROKEN, {}, "a\ufffdb\ufffd日\ufffdc\ufffd", [0, 1, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7]),
        ([b"\xe6", b"b", b"c"], {"stop": "c"}, "\ufffdb", [0, 1, 2]),
        ([b"a", b"\xe6", b"b"], {"stop": "\ufffdb"}, "a", [0, 1, 1]),
        ([b"a", b"\xe6", b"b"], {"stop": "b", "include_stop_str_in_output": True}, "a\ufffdb", [0, 1, 2]),
    ],
    ids=["all", "stopped after", "stopped within", "stop included"],
)
async def test_offsets_after_characters_that_nothing_finishes(
    build: Build,
    tokenizer: TextTokenizer,
    per_delta: int,
    pieces: list[bytes],
    extra: dict[str, Any],
    text: str,
    offsets: list[int],
) -> None:
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    tokens = [by_bytes[bytes([byte])] for piece in pieces for byte in piece]
    house = await build(writes(tokens, per_delta=per_delta))
    fields = {"max_tokens": 100, "logprobs": 0, **extra}
    choice = (await house.complete(**fields)).json()["choices"][0]
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == offsets
    *chunks, _ = events((await house.complete(stream=True, **fields)).text)
    streamed = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert [offset for each in streamed for offset in each] == offsets
    if not extra:
        echo = {"prompt": tokens, "echo": True, "max_tokens": 0, "logprobs": 0}
        choice = (await house.complete(**echo)).json()["choices"][0]
        assert choice["text"] == text
        assert choice["logprobs"]["text_offset"] == offsets


async def test_offsets_after_a_character_that_the_prompt_began(build: Build, tokenizer: TextTokenizer) -> None:
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    house = await build(writes([by_bytes[b"b"], by_bytes[b"c"]]))
    prompt = [by_bytes[b"a"], by_bytes[b"\xe6"]]
    choice = (await house.complete(prompt=prompt, max_tokens=2, echo=True, logprobs=0)).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("a\ufffdbc", [0, 1, 2, 3])


async def test_an_end_of_text_after_a_character_that_nothing_finishes(build: Build, tokenizer: TextTokenizer) -> None:
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    house = await build(writes([by_bytes[b"\xe6"], 0], finish="stop", stop_token=0))
    choice = (await house.complete(max_tokens=2, logprobs=0)).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("\ufffd", [0, 1])

"""``collaboration.score``: the prompt's log-probabilities are the joint model's."""

from __future__ import annotations

from typing import Any

import pytest

from engine.types import Delta, ErrorCode, GenerationRequest, TokenLogprobs
from tests.server.conftest import Build, House
from tests.server.fakes import check_error, deltas_of, events, letters

PROMPT = letters("xyz")


def script(request: GenerationRequest) -> list[Delta]:
    """The joint model finds every token less probable than the base does."""
    if not request.scores:
        return deltas_of(request, letters("ab")[: request.sampling.max_tokens])
    assert request.sampling.prompt_logprobs is not None
    entries = [TokenLogprobs([token], [-7.0], 3) for token in request.prompt[1:]]
    return [Delta(request.request_id, prompt_logprobs=entries, finish_reason="length")]


@pytest.mark.parametrize("echo", [False, True])
async def test_a_prompt_is_scored_and_then_continued(build: Build, echo: bool) -> None:
    house = await build(script)
    fields: dict[str, Any] = {"echo": True, "logprobs": 0} if echo else {"prompt_logprobs": 0}
    asked = {"policy": "confidence", "score": "joint"}
    choice = (await house.complete(prompt=PROMPT, max_tokens=2, collaboration=asked, **fields)).json()["choices"][0]
    if echo:
        assert choice["text"] == "xyzab"
        assert choice["logprobs"]["token_logprobs"] == [None, -7.0, -7.0, -0.25, -0.25]
    else:
        assert [entry and [each["logprob"] for each in entry.values()] for entry in choice["prompt_logprobs"]] == [
            None,
            [-7.0],
            [-7.0],
        ]
    scoring, writing = house.engine.seen
    assert (scoring.scores, writing.scores) == (True, False)
    assert scoring.collaboration.policy == writing.collaboration.policy == "confidence"
    assert writing.sampling.prompt_logprobs is None, "the base would score what is scored already"


async def test_a_prompt_is_scored_alone(build: Build) -> None:
    house = await build(script)
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 0, "collaboration": {"score": "joint"}}
    body = (await house.complete(prompt=[PROMPT, letters("w")], **fields)).json()
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [[None, -7.0, -7.0], [None]]
    assert body["usage"]["completion_tokens"] == 0
    assert len(house.engine.seen) == 1, "before the first token there is nothing to score it by"


async def test_a_streamed_echo_is_scored(build: Build) -> None:
    house = await build(script)
    fields: dict[str, Any] = {"echo": True, "logprobs": 0, "stream": True, "collaboration": {"score": "joint"}}
    response = await house.complete(prompt=PROMPT, max_tokens=2, **fields)
    choices = [event["choices"][0] for event in events(response.text)[:-1] if event["choices"]]
    assert "".join(choice["text"] for choice in choices) == "xyzab"
    found = [value for choice in choices if choice["logprobs"] for value in choice["logprobs"]["token_logprobs"]]
    assert found == [None, -7.0, -7.0, -0.25, -0.25]


async def test_chat(build: Build) -> None:
    house = await build(script)
    body = (await house.chat(max_tokens=1, prompt_logprobs=0, collaboration={"score": "joint"})).json()
    first, *others = body["prompt_logprobs"]
    assert first is None
    assert {each["logprob"] for entry in others for each in entry.values()} == {-7.0}


async def test_the_base_scores_unless_it_is_asked_otherwise(build: Build) -> None:
    house = await build(script)
    for options in ({}, {"collaboration": {"score": "base"}}):
        choice = (await house.complete(prompt=PROMPT, max_tokens=1, prompt_logprobs=0, **options)).json()["choices"][0]
        assert [each["logprob"] for entry in choice["prompt_logprobs"][1:] for each in entry.values()] == [-0.25] * 2
    assert not any(request.scores for request in house.engine.seen)


async def test_a_server_may_score_by_the_joint_model_for_clients_that_cannot_say(build: Build) -> None:
    house = await build(script, server={"prompt_scores": "joint"})

    async def scores(**fields: Any) -> set[float]:
        choice = (await house.complete(prompt=PROMPT, max_tokens=1, prompt_logprobs=0, **fields)).json()["choices"][0]
        return {each["logprob"] for entry in choice["prompt_logprobs"][1:] for each in entry.values()}

    assert await scores() == await scores(collaboration={"policy": "confidence"}) == {-7.0}
    assert await scores(collaboration={"score": "base"}) == await scores(model="collm-demo/base") == {-0.25}
    house.engine.seen.clear()
    await house.complete(prompt=PROMPT, max_tokens=1)
    assert [request.scores for request in house.engine.seen] == [False], "nothing is scored that nobody asked for"


@pytest.mark.parametrize(
    "fields",
    [
        {"collaboration": {"score": "joint"}},
        {"collaboration": {"score": "base"}, "logprobs": 1},
        {"collaboration": {"score": "joint"}, "echo": True},
        {"collaboration": {"score": "expert"}, "prompt_logprobs": 1},
        {"collaboration": {"score": "joint"}, "prompt_logprobs": 1, "model": "collm-demo/base"},
    ],
)
async def test_what_is_refused(house: House, fields: dict[str, Any]) -> None:
    check_error(await house.complete(**fields), 400, "collaboration.score")
    assert house.engine.seen == []


async def test_what_the_engine_refuses_or_loses(build: Build) -> None:
    field = "collaboration.score"
    for code, refused, status in ((ErrorCode.INVALID_REQUEST, True, 400), (ErrorCode.STEP_TIMEOUT, False, 504)):

        def fails(request: GenerationRequest, code: ErrorCode = code, refused: bool = refused) -> list[Delta]:
            return [
                Delta(
                    request.request_id,
                    finish_reason="error",
                    error="score: no",
                    code=code,
                    refused=refused,
                    field=field,
                )
            ]

        house = await build(fails)
        response = await house.complete(prompt=PROMPT, prompt_logprobs=1, collaboration={"score": "joint"})
        check_error(response, status, field if refused else None)
        assert [request.scores for request in house.engine.seen] == [True]

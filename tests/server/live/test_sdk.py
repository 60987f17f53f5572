"""The OpenAI SDK, unmodified, against the live server."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from tests.live import LiveServer
from tests.waiting import eventually

MODEL = "collm-demo"
EXPERTS = ("codes", "arithmetic")
MEMBERS = [f"{MODEL}/{name}" for name in ("base", *EXPERTS)]
REPORT = {"collaboration": {"report": True}}


def _ask(client: openai.OpenAI, prompt: Any, model: str = MODEL, **options: Any) -> Completion:
    return client.completions.create(model=model, prompt=prompt, **{"temperature": 0, "max_tokens": 40, **options})


def _report(choice: Any) -> dict[str, list[Any]]:
    report = choice.collaboration
    assert len(report["tokens"]) == len(report["sources"]) == len(report["deferral_probabilities"])
    return report  # type: ignore[no-any-return]


def test_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {MODEL, *MEMBERS}
    assert client.models.retrieve(f"{MODEL}/codes").id == f"{MODEL}/codes"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-2")


def test_joint_knows_what_neither_member_knows(client: openai.OpenAI, questions: list[dict[str, Any]]) -> None:
    """Held-out questions: each member alone fails most of them, the joint model answers most of them."""
    sample = [item for item in questions if item["task"] != "greeting"][::12]
    right = {
        model: sum(
            choice.text == item["completion"]
            for choice, item in zip(_ask(client, [i["prompt"] for i in sample], model).choices, sample, strict=True)
        )
        / len(sample)
        for model in (MODEL, *MEMBERS)
    }
    assert right[MODEL] >= 0.7
    assert max(right[member] for member in MEMBERS) <= 0.3


def test_each_expert_writes_what_it_knows(client: openai.OpenAI) -> None:
    """Two experts, one gate: who is asked depends on the position."""
    for prompt, answer, who in (
        ("What is a^3 · a^2 if a = 5?", "a^3 · a^2 = a^5 = 5^5 = 3125.", "arithmetic"),
        ("What is the alpha-3 code of Eritrea?", "The alpha-3 code of Eritrea is ERI.", "codes"),
    ):
        choice = _ask(client, f"Question: {prompt}\nAnswer:", extra_body=REPORT).choices[0]
        assert choice.text == f" {answer}"
        assert set(_report(choice)["sources"]) == {"base", who}


def test_usage_sums(client: openai.OpenAI, questions: list[dict[str, Any]]) -> None:
    completion = _ask(client, [item["prompt"] for item in questions[:8]], extra_body=REPORT)
    usage = completion.usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    details = usage.completion_tokens_details.model_dump()
    sources = [source for choice in completion.choices for source in _report(choice)["sources"]]
    assert details["base_tokens"] == sources.count("base")
    assert details["expert_tokens"] == sum(source in EXPERTS for source in sources) > 0
    assert usage.completion_tokens == len(sources)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("temperature", [0, 1])
def test_stream_equals_whole(client: openai.OpenAI, questions: list[dict[str, Any]], temperature: int) -> None:
    for item in questions[:60:6]:
        options: dict[str, Any] = {"temperature": temperature, "seed": 5, "logprobs": 2, "extra_body": REPORT}
        whole = _ask(client, item["prompt"], **options).choices[0]
        chunks = list(
            _ask(client, item["prompt"], stream=True, stream_options={"include_usage": True}, **options)  # type: ignore[call-overload]
        )
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == len(_report(whole)["tokens"])
        choices = [chunk.choices[0] for chunk in chunks[:-1]]
        assert "".join(choice.text for choice in choices) == whole.text
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [whole.finish_reason]
        for key in ("tokens", "sources", "deferral_probabilities"):
            streamed = [value for choice in choices if choice.collaboration for value in choice.collaboration[key]]
            assert streamed == pytest.approx(_report(whole)[key]) if key[0] == "d" else _report(whole)[key]
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
        assert whole.logprobs is not None
        assert tokens == whole.logprobs.tokens


def test_stop_across_a_source_change(client: openai.OpenAI, questions: list[dict[str, Any]]) -> None:
    """A stop string that begins in a base token and ends in an expert token."""
    found = 0
    for item in questions[:40:2]:
        whole = _ask(client, item["prompt"], extra_body=REPORT).choices[0]
        report = _report(whole)
        for index in range(1, len(report["sources"])):
            before, after = report["tokens"][index - 1], report["tokens"][index]
            if report["sources"][index - 1] == "base" and report["sources"][index] in EXPERTS and after.strip():
                stop = before[-1] + after[: len(after) - len(after.lstrip()) + 1]
                if whole.text.count(stop) != 1:
                    continue
                found += 1
                stopped = _ask(client, item["prompt"], stop=stop, extra_body=REPORT)
                assert stopped.choices[0].text == whole.text.split(stop)[0]
                assert stopped.choices[0].finish_reason == "stop"
                assert stopped.usage is not None
                assert stopped.usage.completion_tokens == index + 1
                streamed = _ask(client, item["prompt"], stop=stop, stream=True)
                assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.choices[0].text  # type: ignore[attr-defined]
                break
    assert found >= 3


def test_n_and_seed(client: openai.OpenAI, questions: list[dict[str, Any]]) -> None:
    prompt = questions[0]["prompt"]
    options: dict[str, Any] = {"temperature": 2.0, "seed": 11, "n": 4, "extra_body": {"ignore_eos": True}}
    first, second = (_ask(client, prompt, **options) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.text for choice in first.choices}) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    alone = _ask(client, prompt, **{**options, "n": 1})
    assert alone.choices[0].text == first.choices[0].text


def test_logprobs_and_echo(client: openai.OpenAI, questions: list[dict[str, Any]]) -> None:
    prompt = questions[0]["prompt"]
    choice = _ask(client, prompt, logprobs=3, echo=True).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert choice.text.startswith(prompt)
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.tokens[-1] == "<|endoftext|>"  # a token, but no text
    for token, offset in zip(logprobs.tokens[:-1], logprobs.text_offset, strict=False):
        assert choice.text[offset:].startswith(token)


def test_prompt_forms(client: openai.OpenAI, demo: LiveServer, questions: list[dict[str, Any]]) -> None:
    prompt = questions[3]["prompt"]
    ids = httpx.post(f"{demo.url}/tokenize", json={"model": MODEL, "prompt": prompt}).json()["tokens"]
    text = _ask(client, prompt).choices[0].text
    for form in ([prompt], ids, [ids]):
        assert _ask(client, form).choices[0].text == text
    both = _ask(client, [ids, ids]).choices
    assert [choice.text for choice in both] == [text, text]


@pytest.mark.parametrize(
    ("collaboration", "sources"),
    [
        ({"policy": "never"}, {"base"}),
        ({"policy": "always", "experts": ["codes"]}, {"codes"}),
        ({"policy": "always", "experts": ["arithmetic"]}, {"arithmetic"}),
        ({"policy": "random", "rate": 0.5, "experts": ["codes"]}, {"base", "codes"}),
        ({"max_expert_tokens": 0}, {"base"}),
        ({"threshold": 1.0}, {"base"}),
    ],
)
def test_collaboration(
    client: openai.OpenAI, questions: list[dict[str, Any]], collaboration: dict[str, Any], sources: set[str]
) -> None:
    body = {"collaboration": {**collaboration, "report": True}, "ignore_eos": True}
    choice = _ask(client, questions[0]["prompt"], extra_body=body, seed=1).choices[0]
    assert set(_report(choice)["sources"]) == sources


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"collaboration": {"policy": "magic"}}}, "collaboration.policy"),
        ({"extra_body": {"collaboration": {"experts": ["nobody"]}}}, "collaboration.experts"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": [10**6]}, "prompt"),
    ],
)
def test_bad_requests_name_the_field(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(client, **{"prompt": "Hello", **options})
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)


def test_client_that_goes_away_frees_both_lanes(
    client: openai.OpenAI, demo: LiveServer, questions: list[dict[str, Any]]
) -> None:
    before = demo.metrics().get("collm_requests_total{outcome=aborted}", 0.0)
    streams = [
        _ask(client, item["prompt"], stream=True, max_tokens=900, extra_body={"ignore_eos": True})
        for item in questions[:8]
    ]
    for stream in streams:
        next(iter(stream))  # type: ignore[call-overload]
        stream.close()  # type: ignore[attr-defined]
    eventually(lambda: demo.metrics().get("collm_requests_total{outcome=aborted}", 0.0) == before + 8)
    eventually(demo.is_empty)


def test_metrics_count_what_the_client_saw(
    client: openai.OpenAI, demo: LiveServer, questions: list[dict[str, Any]]
) -> None:
    names = [*(f"collm_tokens_total{{source={lane}}}" for lane in ("base", *EXPERTS)), "collm_prompt_tokens_total{}"]
    before = demo.metrics()
    usage = _ask(client, [item["prompt"] for item in questions[10:30]]).usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    details = usage.completion_tokens_details.model_dump()
    seen = (details["base_tokens"], details["expert_tokens"], usage.prompt_tokens)

    def counted() -> tuple[float, ...]:
        now = demo.metrics()
        base, *experts, prompt = (now.get(name, 0.0) - before.get(name, 0.0) for name in names)
        return base, sum(experts), prompt

    eventually(lambda: counted() == seen)


SCHEMA = {
    "type": "object",
    "properties": {"code": {"type": "string", "pattern": "^[A-Z]{3}$"}, "sure": {"type": "boolean"}},
    "required": ["code", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
@pytest.mark.parametrize("model", [MODEL, *MEMBERS])
def test_structured_output_is_valid_whoever_writes(
    client: openai.OpenAI, questions: list[dict[str, Any]], options: dict[str, Any], model: str
) -> None:
    body = {**options, **({"collaboration": {"policy": "random", "rate": 0.5}} if model == MODEL else {})}
    choices = _ask(
        client, [item["prompt"] for item in questions[:6]], model, extra_body=body, max_tokens=80, temperature=1, seed=3
    ).choices
    answers = [json.loads(choice.text) for choice in choices if choice.finish_reason == "stop"]
    assert len(answers) >= 4
    for answer in answers:
        assert re.fullmatch("[A-Z]{3}", answer["code"])
        assert isinstance(answer["sure"], bool)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_none_names_its_field(
    client: openai.OpenAI, options: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(client, "Hello", extra_body=options, stream=stream)
    assert caught.value.param == param

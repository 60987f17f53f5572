"""What answers of the demo pair cost, on real lanes."""

from __future__ import annotations

from typing import Any

import openai

MODEL = "collm-demo"
ALWAYS = {"collaboration": {"policy": "always", "experts": ["codes"]}}


def _cost(usage: Any) -> tuple[int, dict[str, dict[str, float]]]:
    return usage.prompt_tokens_details.cached_tokens, usage.collaboration["by_source"]


def test_an_expert_reads_the_whole_prompt_for_one_token(client: openai.OpenAI) -> None:
    """600 tokens that nobody has read before: each member computes them all; then its prefix cache has most of them."""
    prompt = list(range(300, 900))
    ask: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "extra_body": ALWAYS}
    first = client.completions.create(**ask)
    assert first.usage is not None
    cached, members = _cost(first.usage)
    assert (first.usage.prompt_tokens, first.usage.completion_tokens, cached) == (600, 1, 0)
    assert members["codes"]["tokens"] == 1
    assert (members["base"]["prompt_tokens"], members["codes"]["prompt_tokens"]) == (600, 600)
    assert members["arithmetic"] == {"tokens": 0, "prompt_tokens": 0, "seconds": 0.0}
    assert members["base"]["seconds"] > 0
    assert members["codes"]["seconds"] > 0

    again = client.completions.create(**ask)
    assert again.usage is not None
    cached, members = _cost(again.usage)
    assert cached > 400
    for name in ("base", "codes"):
        assert members[name]["prompt_tokens"] == 600 - cached


def test_streams_and_timing(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": MODEL,
        "prompt": "Question: What is the alpha-3 code of Eritrea?\nAnswer:",
        "max_tokens": 40,
        "temperature": 0,
    }
    raw = client.completions.with_raw_response.create(**ask)
    whole = raw.parse().usage
    assert whole is not None
    *_, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert last.usage is not None
    _, of_whole = _cost(whole)
    _, of_stream = _cost(last.usage)
    assert {name: member["tokens"] for name, member in of_whole.items()} == {
        name: member["tokens"] for name, member in of_stream.items()
    }
    assert of_stream["codes"]["tokens"] > 0
    timings = dict(part.split(";dur=") for part in raw.headers["server-timing"].split(", "))
    lanes = sum(float(value) for name, value in timings.items() if name.startswith("lane-"))
    assert 0 < lanes <= float(timings["total"])


def test_a_share_of_tokens(client: openai.OpenAI, questions: list[dict[str, Any]]) -> None:
    """The gate's calibration tells the threshold: on questions of its kind experts write about as much as was asked."""
    [card] = [model for model in client.models.list() if model.id == MODEL]
    curve = card.model_extra["collaboration"]["curve"]  # type: ignore[index]
    assert any(point["threshold"] == 1 and point["share"] == 0 == point["cost"] for point in curve)
    prompts = [item["prompt"] for item in questions[::25]]
    shares = []
    for share in (0.0, 0.2, 0.45, 1.0):
        answers = client.completions.create(
            model=MODEL, prompt=prompts, max_tokens=60, temperature=0, extra_body={"collaboration": {"share": share}}
        )
        assert answers.usage is not None
        details: Any = answers.usage.completion_tokens_details
        shares.append(details.expert_tokens / answers.usage.completion_tokens)
    assert (shares[0], shares[3]) == (0.0, 1.0)
    assert abs(shares[1] - 0.2) < 0.1
    assert shares[1] < shares[2] < 1.0

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

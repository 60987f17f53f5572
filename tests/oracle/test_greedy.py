"""Greedy output of the served pair equals the oracle's, token for token and source for source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import assert_empty, assert_same, preemptions, run
from tests.oracle.pairs import CHUNKED, OVERLAPPED, PRESSED, TIGHT
from tests.oracle.reference import Written, greedy

SETTINGS: dict[str, dict[str, Any]] = {
    "lockstep": {},
    "lockstep, no prefix caching": {"enable_prefix_caching": False},
    "lockstep, chunked prefill": CHUNKED,
    "lockstep, tight KV": TIGHT,
    "lockstep, chunked prefill, tight KV, no prefix caching": PRESSED,
    "overlapped": OVERLAPPED,
    "overlapped, chunked prefill, tight KV": {**OVERLAPPED, **CHUNKED, **TIGHT},
}

SLOW = ("lockstep, no prefix caching", "lockstep, chunked prefill", "lockstep, tight KV", "overlapped")
"""Each takes an engine of its own, for something that one of the others does along with more."""


def _requests(prompts: list[list[int]], tag: str) -> list[GenerationRequest]:
    sampling = SamplingSpec(temperature=0.0, max_tokens=50)
    return [GenerationRequest(f"{tag}-{number}", prompt, sampling) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, settings in SETTINGS.items()
    ],
)
def test_equals_the_oracle(
    settings: dict[str, Any],
    engine_of: Callable[..., Engine],
    prompts: list[list[int]],
    written: list[Written],
) -> None:
    # The oracle itself must exercise both models, or this shows nothing.
    sources = [source for one in written for source in one.sources]
    assert 0.2 < sum(sources) / len(sources) < 0.8
    engine = engine_of(**settings)
    assert engine.info.coordination == settings.get("coordination", "lockstep")
    before = preemptions(engine)
    assert_same(run(engine, _requests(prompts, "batch"), 32), written)
    more = [now - then for now, then in zip(preemptions(engine), before, strict=True)]
    if "kv_blocks" in settings:
        assert min(more) > 0, "the KV memory was meant to be too small in both lanes"
    else:
        assert more == [0, 0]
    assert_same(run(engine, _requests(prompts, "alone"), 1), written)


@pytest.fixture(scope="module")
def demo_engine(demo_pair: pairs.Served) -> Iterator[Engine]:
    with Engine(demo_pair.config()) as engine:
        yield engine


@pytest.fixture(scope="module")
def demo_written(demo_engine: Engine, demo_pair: pairs.Served, demo_questions: list[list[int]]) -> list[Written]:
    gate = demo_engine.info.gate
    assert gate is not None
    return [greedy(demo_pair.reference, prompt, 40, threshold=gate.threshold) for prompt in demo_questions]


@pytest.mark.parametrize("concurrency", [1, 32])
def test_demo_pair_equals_the_oracle(
    concurrency: int, demo_engine: Engine, demo_written: list[Written], demo_questions: list[list[int]]
) -> None:
    sampling = SamplingSpec(temperature=0.0, max_tokens=40)
    requests = [
        GenerationRequest(f"{concurrency}-{number}", prompt, sampling) for number, prompt in enumerate(demo_questions)
    ]
    assert_same(run(demo_engine, requests, concurrency), demo_written)
    assert_empty(demo_engine)


@pytest.mark.parametrize("threshold", [0.1, 0.9])
@pytest.mark.parametrize("policy", ["threshold", "confidence"])
def test_policies_and_thresholds(
    policy: Any, threshold: float, plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]
) -> None:
    expected = [
        greedy(random_pair.reference, prompt, 20, policy=policy, threshold=threshold) for prompt in prompts[:12]
    ]
    requests = [
        GenerationRequest(
            f"{policy}-{threshold}-{number}",
            prompt,
            SamplingSpec(temperature=0.0, max_tokens=20),
            Collaboration(policy=policy, threshold=threshold),
        )
        for number, prompt in enumerate(prompts[:12])
    ]
    assert_same(run(plain_engine, requests, 12), expected)


def test_expert_tokens_are_limited(plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]) -> None:
    expected = [greedy(random_pair.reference, prompt, 30, max_expert_tokens=3) for prompt in prompts[:12]]
    assert max(sum(one.sources) for one in expected) == 3
    requests = [
        GenerationRequest(
            f"limit-{number}",
            prompt,
            SamplingSpec(temperature=0.0, max_tokens=30),
            Collaboration(max_expert_tokens=3),
        )
        for number, prompt in enumerate(prompts[:12])
    ]
    assert_same(run(plain_engine, requests, 12), expected)


def test_two_experts(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> None:
    """K = 2: the gate is a softmax, and either expert may write; one expert's share can be excluded."""
    served = pairs.random_pair(tmp_path_factory.mktemp("two-experts"), experts=2)
    expected = [greedy(served.reference, prompt, 30) for prompt in prompts[:16]]
    assert {source for one in expected for source in one.sources} == {0, 1, 2}
    with Engine(served.config()) as engine:
        assert_same(run(engine, _shorter(prompts[:16]), 16), expected)
        only_second = engine.generate(
            GenerationRequest(f"second-{number}", prompt, SamplingSpec(temperature=0.0), Collaboration(experts=(2,)))
            for number, prompt in enumerate(prompts[:16])
        )
        assert {source for one in only_second for source in one.sources} == {0, 2}
        assert_empty(engine)


def _shorter(prompts: list[list[int]]) -> list[GenerationRequest]:
    sampling = SamplingSpec(temperature=0.0, max_tokens=30)
    return [GenerationRequest(f"short-{number}", prompt, sampling) for number, prompt in enumerate(prompts)]

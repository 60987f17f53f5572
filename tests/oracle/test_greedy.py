"""Greedy output of the served pair equals the oracle's, token for token and source for source."""

from __future__ import annotations

from typing import Any

import pytest

from engine.client import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import assert_empty, assert_same, run
from tests.oracle.reference import Written, greedy

CHUNKED = {"max_num_batched_tokens": 32, "max_num_seqs": 32}
# The longest request needs 4 blocks of 32 tokens; 32 of them at once would need over 100.
TIGHT = {"kv_blocks": (16, 12)}
OVERLAPPED = {"coordination": "overlapped", "executor": "mp"}

SETTINGS: dict[str, dict[str, Any]] = {
    "lockstep": {},
    "lockstep, no prefix caching": {"enable_prefix_caching": False},
    "lockstep, chunked prefill": CHUNKED,
    "lockstep, tight KV": TIGHT,
    "lockstep, chunked prefill, tight KV, no prefix caching": {**CHUNKED, **TIGHT, "enable_prefix_caching": False},
    "overlapped": OVERLAPPED,
    "overlapped, chunked prefill, tight KV": {**OVERLAPPED, **CHUNKED, **TIGHT},
}


def _requests(prompts: list[list[int]], tag: str) -> list[GenerationRequest]:
    sampling = SamplingSpec(temperature=0.0, max_tokens=50)
    return [GenerationRequest(f"{tag}-{number}", prompt, sampling) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_the_oracle(
    settings: dict[str, Any],
    random_pair: pairs.Served,
    prompts: list[list[int]],
    written: list[Written],
) -> None:
    # The oracle itself must exercise both models, or this shows nothing.
    sources = [source for one in written for source in one.sources]
    assert 0.2 < sum(sources) / len(sources) < 0.8
    with Engine(random_pair.config(**settings)) as engine:
        assert engine.info.coordination == settings.get("coordination", "lockstep")
        assert_same(run(engine, _requests(prompts, "batch"), 32), written)
        preemptions = [lane.preemptions for lane in assert_empty(engine).lanes]
        if "kv_blocks" in settings:
            assert min(preemptions) > 0, "the KV memory was meant to be too small in both lanes"
        else:
            assert preemptions == [0, 0]
        assert_same(run(engine, _requests(prompts, "alone"), 1), written)
        assert_empty(engine)


@pytest.fixture(scope="module")
def demo_engine(demo_pair: pairs.Served) -> Any:
    with Engine(demo_pair.config()) as engine:
        yield engine


@pytest.mark.parametrize("concurrency", [1, 32])
def test_demo_pair_equals_the_oracle(
    concurrency: int, demo_engine: Engine, demo_pair: pairs.Served, demo_questions: list[list[int]]
) -> None:
    gate = demo_engine.info.gate
    assert gate is not None
    expected = [greedy(demo_pair.reference, prompt, 40, threshold=gate.threshold) for prompt in demo_questions]
    sampling = SamplingSpec(temperature=0.0, max_tokens=40)
    requests = [
        GenerationRequest(f"{concurrency}-{number}", prompt, sampling) for number, prompt in enumerate(demo_questions)
    ]
    assert_same(run(demo_engine, requests, concurrency), expected)
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

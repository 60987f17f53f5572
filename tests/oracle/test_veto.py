"""An expert that is not sure stands back for the base: against the float32 loop, and against the base alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.offline import Engine
from engine.types import BASE, Collaboration, Completion, GenerationRequest, SamplingSpec, StructuredOutputs
from tests.oracle import pairs
from tests.oracle.checks import LOG_PROBABILITY, assert_empty, assert_same, preemptions, run
from tests.oracle.pairs import CHUNKED, OVERLAPPED, PRESSED, TIGHT
from tests.oracle.reference import Written, greedy, hidden_and_logits

COUNT = 12

VETO = 0.6
"""About a third of the random expert's tokens are less sure."""


@pytest.fixture(scope="module")
def expected(random_pair: pairs.Served, prompts: list[list[int]]) -> list[Written]:
    written = [greedy(random_pair.reference, prompt, 30, veto=VETO) for prompt in prompts[:COUNT]]
    vetoed, kept = sum(len(one.vetoed) for one in written), sum(sum(one.sources) for one in written)
    assert min(vetoed, kept) > 30, "the loop itself must do both, or this shows nothing"
    sure = [value for one in written for _, value in one.confidences if value is not None]
    assert min(abs(value - VETO) for value in sure) > 1e-5, "nearer than rounding: take another veto"
    return written


GREEDY = SamplingSpec(temperature=0.0, max_tokens=30)


def asked(prompts: list[list[int]], tag: str, sampling: SamplingSpec = GREEDY, **how: Any) -> list[GenerationRequest]:
    collaboration = Collaboration(**{"veto": VETO, "looks": True, **how})
    return [GenerationRequest(f"{tag}-{n}", prompt, sampling, collaboration) for n, prompt in enumerate(prompts)]


def assert_vetoed(completions: list[Completion], expected: list[Written]) -> None:
    assert_same(completions, expected)
    for completion, want in zip(completions, expected, strict=True):
        assert completion.vetoed == want.vetoed
        of_base = [sure for sure, _ in want.confidences]
        assert [look.base for look in completion.looks] == pytest.approx(of_base, abs=1e-4)
        for look, (_, sure) in zip(completion.looks, want.confidences, strict=True):
            assert (look.agreed is None) == (sure is None)
            assert look.expert == (None if sure is None else pytest.approx(sure, abs=1e-4))


def test_equals_the_loop(plain_engine: Engine, prompts: list[list[int]], expected: list[Written]) -> None:
    """Step by step and with windows of drafts; the second time the prefix caches know all that was written."""
    before = assert_empty(plain_engine)
    for turn, run_ahead in enumerate(("off", 6, "auto")):
        assert_vetoed(run(plain_engine, asked(prompts[:COUNT], f"v{turn}", run_ahead=run_ahead), COUNT), expected)
    assert_vetoed(run(plain_engine, asked(prompts[:6], "alone", run_ahead=6), 1), expected[:6])
    after = assert_empty(plain_engine)
    times = [3 + (number < 6) for number in range(COUNT)]
    assert after.vetoed - before.vetoed == sum(
        len(one.vetoed) * count for one, count in zip(expected, times, strict=True)
    )
    assert after.runahead_accepted > before.runahead_accepted


@pytest.mark.slow
def test_equals_the_loop_under_pressure(
    engine_of: Callable[..., Engine], prompts: list[list[int]], expected: list[Written]
) -> None:
    engine = engine_of(**PRESSED)
    before = preemptions(engine)
    assert_vetoed(run(engine, asked(prompts[:COUNT], "pressed", run_ahead=4), COUNT), expected)
    assert all(now > then for now, then in zip(preemptions(engine), before, strict=True))


@pytest.mark.slow
def test_equals_the_loop_in_worker_processes(
    engine_of: Callable[..., Engine], prompts: list[list[int]], expected: list[Written]
) -> None:
    engine = engine_of(**{**OVERLAPPED, **CHUNKED, **TIGHT})
    assert_vetoed(run(engine, asked(prompts[:COUNT], "workers", run_ahead=4), COUNT), expected)


def test_stood_back_for_tokens_are_none_of_the_experts(
    plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]
) -> None:
    """With windows it is known late how many are left of a limit. Penalties go by what was written."""
    penalties: dict[str, Any] = {"frequency_penalty": 0.8, "repetition_penalty": 1.2}
    cases: list[tuple[str, int | None, dict[str, Any]]] = [("limit", 3, {}), ("penalties", None, penalties)]
    for tag, limit, fields in cases:
        sampling = SamplingSpec(temperature=0.0, max_tokens=20, **fields)
        want = [
            greedy(random_pair.reference, prompt, 20, veto=VETO, max_expert_tokens=limit, **fields)
            for prompt in prompts[:6]
        ]
        assert any(one.vetoed for one in want)
        for run_ahead in ("off", 6):
            how = {"max_expert_tokens": limit, "run_ahead": run_ahead}
            assert_vetoed(run(plain_engine, asked(prompts[:6], f"{tag}-{run_ahead}", sampling, **how), 6), want)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSpec(temperature=1.0, seed=5, max_tokens=30, logprobs=2),
        SamplingSpec(temperature=0.8, top_p=0.9, seed=6, max_tokens=30, presence_penalty=0.5),
        SamplingSpec(seed=7, max_tokens=30, structured_outputs=StructuredOutputs(regex="[a-f]{4}-[0-9]{12}")),
    ],
    ids=["logprobs", "penalty", "regex"],
)
def test_a_full_veto_is_the_base_alone(sampling: SamplingSpec, plain_engine: Engine, prompts: list[list[int]]) -> None:
    """What is written for an expert that stands back is drawn from the base's own distribution, by the same noise."""
    alone = run(plain_engine, asked(prompts[:8], "base", sampling, member=BASE, veto=None), 8)
    for run_ahead in ("off", 6):
        how = {"policy": "always", "veto": 1.0, "run_ahead": run_ahead}
        got = run(plain_engine, asked(prompts[:8], f"full-{run_ahead}", sampling, **how), 8)
        assert [one.tokens for one in got] == [one.tokens for one in alone]
        assert all(one.sources == [BASE] * len(one.tokens) for one in got)
        assert all(one.vetoed == list(range(len(one.tokens))) for one in got)
        if sampling.logprobs is not None:
            for one, other in zip(got, alone, strict=True):
                assert one.logprobs is not None
                assert other.logprobs is not None
                for mine, its in zip(one.logprobs, other.logprobs, strict=True):
                    assert mine.token_ids == its.token_ids
                    assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-3)


def test_same_seed_same_answer(plain_engine: Engine, prompts: list[list[int]]) -> None:
    sampling = SamplingSpec(temperature=0.9, seed=11, max_tokens=30)
    step_by_step = run(plain_engine, asked(prompts[:8], "steps", sampling, run_ahead="off"), 8)
    windows = run(plain_engine, asked(prompts[:8], "windows", sampling, run_ahead=6), 4)
    assert [(one.tokens, one.sources, one.vetoed) for one in windows] == [
        (one.tokens, one.sources, one.vetoed) for one in step_by_step
    ]
    assert any(one.vetoed for one in windows)


def test_a_text_is_scored_by_who_would_write(
    plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]
) -> None:
    text = next(prompt for prompt in prompts if len(prompt) > 40)
    pair = random_pair.reference
    want, stood_back = [], 0
    with torch.inference_mode():
        for end in range(1, len(text)):
            logprobs = hidden_and_logits(pair.experts[0], text[:end])[1].log_softmax(-1)
            if float(logprobs.max().exp()) < VETO:
                stood_back += 1
                logprobs = hidden_and_logits(pair.base, text[:end])[1].log_softmax(-1)
            want.append(float(logprobs[text[end]]))
    assert 0 < stood_back < len(want)
    scoring = SamplingSpec(prompt_logprobs=0)
    (got,) = plain_engine.generate(
        [GenerationRequest("score", text, scoring, Collaboration(policy="always", veto=VETO), scores=True)]
    )
    assert got.prompt_logprobs is not None
    assert [entry.logprobs[0] for entry in got.prompt_logprobs] == pytest.approx(want, abs=LOG_PROBABILITY)


def test_what_averages_members_vetoes_nobody(plain_engine: Engine, prompts: list[list[int]]) -> None:
    """The gate's marginal is an average."""
    scoring = SamplingSpec(prompt_logprobs=0)
    text = next(prompt for prompt in prompts if len(prompt) > 5)
    (got,) = plain_engine.generate(
        [GenerationRequest("marginal", text, scoring, Collaboration(veto=VETO), scores=True)]
    )
    assert got.error is not None
    assert got.error.startswith("veto: ")

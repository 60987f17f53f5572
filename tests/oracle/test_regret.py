"""Experts' tokens that the base regrets are taken back: against the float32 loop, on real engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.offline import Engine
from engine.types import Collaboration, Completion, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import abandon_at_any_moment, assert_empty, assert_same, preemptions, run
from tests.oracle.pairs import CHUNKED, OVERLAPPED, PRESSED, TIGHT
from tests.oracle.reference import Written, greedy, regretting

COUNT = 12
LENGTH = 30
REGRET = 0.6
"""About half of the random pair's disputed tokens are regretted more."""
GREEDY = SamplingSpec(temperature=0.0, max_tokens=LENGTH)


@pytest.fixture(scope="module")
def expected(random_pair: pairs.Served, prompts: list[list[int]]) -> list[Written]:
    written = [regretting(random_pair.reference, prompt, LENGTH, REGRET) for prompt in prompts[:COUNT]]
    regretted = sum(len(one.regretted) for one in written)
    regrets = [value for one in written for value in one.regrets]
    assert min(regretted, len(regrets) - regretted) > 20, "the loop itself must do both, or this shows nothing"
    assert min(abs(value - REGRET) for value in regrets) > 1e-4, "nearer than rounding: take another threshold"
    return written


def asked(prompts: list[list[int]], tag: str, sampling: SamplingSpec = GREEDY, **how: Any) -> list[GenerationRequest]:
    collaboration = Collaboration(**{"regret": REGRET, **how})
    return [GenerationRequest(f"{tag}-{n}", prompt, sampling, collaboration) for n, prompt in enumerate(prompts)]


def assert_regretted(completions: list[Completion], expected: list[Written]) -> None:
    assert_same(completions, expected)
    for completion, want in zip(completions, expected, strict=True):
        assert completion.regretted == want.regretted


def test_equals_the_loop(plain_engine: Engine, prompts: list[list[int]], expected: list[Written]) -> None:
    """Step by step and with windows of drafts; the second time the prefix caches know all that was written."""
    before = assert_empty(plain_engine)
    for turn, run_ahead in enumerate(("off", 6, "auto")):
        requests = asked(prompts[:COUNT], f"r{turn}", run_ahead=run_ahead, looks=True)
        found = run(plain_engine, requests, COUNT)
        assert_regretted(found, expected)
        for completion, want in zip(found, expected, strict=True):
            # Of the base's tokens in place of the expert's, what both were sure of.
            for index in want.regretted:
                look = completion.looks[index]
                assert (look.base, look.expert) == pytest.approx(want.confidences[index], abs=1e-4)
                assert look.agreed is False
    assert_regretted(run(plain_engine, asked(prompts[:6], "alone", run_ahead=6), 1), expected[:6])
    after = assert_empty(plain_engine)
    times = [3 + (number < 6) for number in range(COUNT)]
    regretted = sum(len(one.regretted) * count for one, count in zip(expected, times, strict=True))
    assert after.regretted - before.regretted == regretted
    assert after.revoked - before.revoked > regretted


def test_others_beside_it_are_not_touched(
    plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]], expected: list[Written]
) -> None:
    """And what was taken back is in no prefix cache that they share."""
    plain = [greedy(random_pair.reference, prompt, LENGTH) for prompt in prompts[:6]]
    mixed = [*asked(prompts[:6], "with"), *asked(prompts[:6], "without", regret=None)]
    assert_regretted(run(plain_engine, mixed, 12), [*expected[:6], *plain])


def test_penalties_limits_and_ends(plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]) -> None:
    """Penalties go by what stands, a limit by the experts' tokens that stand; nothing is cut before min_tokens."""
    cases: list[tuple[str, int | None, dict[str, Any]]] = [
        ("penalties", None, {"frequency_penalty": 0.8, "repetition_penalty": 1.2}),
        ("limit", 4, {}),
        ("least", None, {"min_tokens": 8}),
        ("stop", None, {"stop_token_ids": tuple(range(100, 130))}),
        ("bias", None, {"logit_bias": {17: 2.0}, "bad_words": ((40,), (41, 42))}),
    ]
    for tag, limit, fields in cases:
        sampling = SamplingSpec(temperature=0.0, max_tokens=20, **fields)
        want = [
            regretting(random_pair.reference, prompt, 20, 0.4, max_expert_tokens=limit, **fields)
            for prompt in prompts[:COUNT]
        ]
        assert any(one.regretted for one in want), tag
        for run_ahead in ("off", 6):
            how = {"max_expert_tokens": limit, "run_ahead": run_ahead, "regret": 0.4}
            found = run(plain_engine, asked(prompts[:COUNT], f"{tag}-{run_ahead}", sampling, **how), COUNT)
            assert_regretted(found, want)


def test_same_seed_same_answer(plain_engine: Engine, prompts: list[list[int]]) -> None:
    sampling = SamplingSpec(temperature=0.9, seed=11, max_tokens=LENGTH, logprobs=1)
    step_by_step = run(plain_engine, asked(prompts[:8], "steps", sampling, run_ahead="off"), 8)
    windows = run(plain_engine, asked(prompts[:8], "windows", sampling, run_ahead=6), 4)
    assert [(one.tokens, one.sources, one.regretted) for one in windows] == [
        (one.tokens, one.sources, one.regretted) for one in step_by_step
    ]
    assert any(one.regretted for one in windows)
    for one in windows:
        assert one.logprobs is not None
        assert [entry.token_ids[0] for entry in one.logprobs] == one.tokens


def test_abandoned_at_any_moment_nothing_is_left(plain_engine: Engine, prompts: list[list[int]]) -> None:
    abandon_at_any_moment(plain_engine, prompts, 48, seed=3, regret=0.4)
    assert_empty(plain_engine)


@pytest.mark.slow
def test_equals_the_loop_under_pressure(
    engine_of: Callable[..., Engine], prompts: list[list[int]], expected: list[Written]
) -> None:
    engine = engine_of(**PRESSED)
    before = preemptions(engine)
    assert_regretted(run(engine, asked(prompts[:COUNT], "pressed", run_ahead=4), COUNT), expected)
    assert all(now > then for now, then in zip(preemptions(engine), before, strict=True))


@pytest.mark.slow
def test_equals_the_loop_in_worker_processes(
    engine_of: Callable[..., Engine], prompts: list[list[int]], expected: list[Written]
) -> None:
    engine = engine_of(**{**OVERLAPPED, **CHUNKED, **TIGHT})
    assert_regretted(run(engine, asked(prompts[:COUNT], "workers", run_ahead=4), COUNT), expected)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_equals_the_loop_with_steps_in_flight(
    steps: int, engine_of: Callable[..., Engine], prompts: list[list[int]], expected: list[Written]
) -> None:
    engine = engine_of(scheduler={"steps_in_flight": steps}, **CHUNKED, **TIGHT)
    for run_ahead in ("off", 4):
        tag = f"flight-{steps}-{run_ahead}"
        assert_regretted(run(engine, asked(prompts[:COUNT], tag, run_ahead=run_ahead), COUNT), expected)

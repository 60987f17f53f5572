"""Assertions and drivers that the oracle tests share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from engine.offline import Engine
from engine.stats import EngineStats
from engine.types import Collaboration, Completion, GenerationRequest, SamplingSpec
from tests.oracle.reference import Written
from tests.waiting import eventually

LOG_PROBABILITY = 3e-4 if torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1e-4
"""How far float32 log-probabilities of the engine and of a loop may lie apart, in nats.

Both sum the same products in another order, in as many partial sums as a vector has lanes: with four of them instead of
eight or sixteen the sums are longer and round more (up to 1.9e-4 was seen). A GPU splits the sums in its
own way (1.2e-4 was seen on an H200).
"""


def assert_same(completions: list[Completion], expected: list[Written]) -> None:
    """Token for token, source for source, and the gate's value at each within float32 rounding."""
    assert len(completions) == len(expected)
    for number, (completion, want) in enumerate(zip(completions, expected, strict=True)):
        assert completion.error is None
        assert (number, completion.tokens, completion.sources) == (number, want.tokens, want.sources)
        assert completion.finish_reason == want.finish_reason
        assert completion.deferrals == pytest.approx(want.deferrals, abs=1e-3)


def run(engine: Engine, requests: list[GenerationRequest], concurrency: int) -> list[Completion]:
    """All requests, ``concurrency`` at a time."""
    done: list[Completion] = []
    for start in range(0, len(requests), concurrency):
        done += engine.generate(requests[start : start + concurrency])
    return done


def abandon_at_any_moment(
    engine: Engine, prompts: Sequence[list[int]], count: int, seed: int, regret: float | None = None
) -> None:
    """Requests that half defer, each abandoned after a random number of deltas (also before the first one)."""
    draw = random.Random(seed)

    async def abandon(number: int, after: int) -> None:
        request = GenerationRequest(
            f"abandoned-{number}",
            # Of its own, so that no prefix cache shortens what can be abandoned, nor knows other tests' prompts then.
            [1 + number, *prompts[number % len(prompts)]],
            SamplingSpec(temperature=0.0, max_tokens=100, ignore_eos=True),
            Collaboration(policy="random", rate=0.5, regret=regret),
        )
        stream = engine.client.generate(request)
        if after == 0:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            async for _ in stream:
                after -= 1
                if after == 0:
                    break
        await stream.aclose()  # type: ignore[attr-defined]

    async def all_of_them() -> int:
        return len(await asyncio.gather(*(abandon(number, draw.randrange(12)) for number in range(count))))

    assert asyncio.run_coroutine_threadsafe(all_of_them(), engine._loop).result(timeout=300) == count


def assert_empty(engine: Engine) -> EngineStats:
    """The engine has gone idle: no request and no KV block in any lane, and its own integrity check found nothing."""
    eventually(lambda: not engine.stats.running and all(not lane.rows for lane in engine.stats.lanes))
    stats = engine.stats
    assert [lane.requests for lane in stats.lanes] == [0] * len(stats.lanes)
    assert [lane.kv_usage for lane in stats.lanes] == [0.0] * len(stats.lanes)
    assert stats.integrity_errors == 0
    return stats


def frequencies_pvalue(counts: Sequence[float], probabilities: Sequence[float]) -> float:
    """Of the chi-square test that ``counts`` were drawn from ``probabilities``, which may be sums of float32 values.

    The statistics library wants both sums to be equal to 1e-8, which float32 cannot promise.
    """
    weights = np.asarray(probabilities, dtype=np.float64)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    expected = weights / weights.sum() * np.sum(counts)
    assert expected.min() >= 5, "too rare to be tested: count such cells together"
    return float(chisquare(np.asarray(counts, dtype=np.float64), expected).pvalue)


def preemptions(engine: Engine) -> list[int]:
    """Of each lane, so far, once the engine is idle."""
    return [lane.preemptions for lane in assert_empty(engine).lanes]

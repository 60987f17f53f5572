"""Aborts free both lanes, wherever the request is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import abandon_at_any_moment, assert_empty


def test_abandoned_at_any_moment(plain_engine: Engine, prompts: list[list[int]]) -> None:
    """200 requests, each abandoned after a random number of deltas (also before the first one)."""
    abandon_at_any_moment(plain_engine, prompts, 200, seed=3)
    assert_empty(plain_engine)


@pytest.mark.parametrize(
    "settings", [pairs.PRESSED, pytest.param(pairs.CHUNKED, marks=pytest.mark.slow)], ids=["pressed", "chunked"]
)
def test_abandoned_while_parked_and_while_prefilling(
    settings: dict[str, Any], engine_of: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    """A prompt that takes many steps to prefill is dropped in the midst of it, others while the expert catches up."""
    engine = engine_of(**settings)
    longest = max(prompts, key=len)
    always = Collaboration(policy="always")
    before = [lane.computed_tokens for lane in assert_empty(engine).lanes]

    async def drop(number: int, pause: float) -> None:
        request = GenerationRequest(
            f"dropped-{number}",
            [*longest, 1 + number],
            SamplingSpec(temperature=0.0, max_tokens=60, ignore_eos=True),
            always,
        )
        task = asyncio.ensure_future(anext(engine.client.generate(request)))
        await asyncio.sleep(pause)
        await engine.client.abort([request.request_id])
        await asyncio.gather(task, return_exceptions=True)

    async def drop_all() -> None:
        await asyncio.gather(*(drop(number, number * 0.002) for number in range(60)))

    asyncio.run_coroutine_threadsafe(drop_all(), engine._loop).result(timeout=300)
    assert assert_empty(engine).lanes[0].computed_tokens > before[0]
    # The engine still answers.
    (completion,) = engine.generate(
        [GenerationRequest("after", prompts[0], SamplingSpec(temperature=0.0, max_tokens=5))]
    )
    assert len(completion.tokens) == 5 or completion.finish_reason == "stop"

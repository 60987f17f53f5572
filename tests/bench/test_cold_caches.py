"""The measurement with cold caches, on a real engine of its own."""

from __future__ import annotations

import asyncio

import pytest

from bench.cold_caches import Task, measure, prompts
from bench.contenders.engine_alone import engine_config
from bench.errors import BenchError
from bench.settings import Settings
from bench.shapes import Pair


def task(pair: Pair, max_tokens: int) -> Task:
    config = engine_config(Settings(pair, max_num_seqs=2, request_tokens=64 + max_tokens))
    return Task(config.model_dump(mode="json"), pair.vocab_size, [16, 64], 2, 1.0, max_tokens, 2, seed=1)


def test_every_length_has_a_value_a_round(tiny: Pair) -> None:
    found = asyncio.run(measure(task(tiny, 8)))
    assert list(found) == [16, 64]
    for values in found.values():
        assert len(values) == 2
        assert min(values) > 0


def test_a_stretch_without_tokens_is_an_error(tiny: Pair) -> None:
    with pytest.raises(BenchError, match="--max-tokens is too few"):
        asyncio.run(measure(task(tiny, 1)))


def test_no_two_prompts_share_a_prefix() -> None:
    asked = Task({}, 512, [32], 4, 0.3, 8, 1, seed=1)
    rounds = [prompts(asked, number, 32) for number in (0, 1)]
    assert rounds[0] == prompts(asked, 0, 32)
    beginnings = {tuple(job.prompt[:8]) for jobs in rounds for job in jobs}
    assert len(beginnings) == 8
    assert all(len(job.prompt) == 32 for jobs in rounds for job in jobs)

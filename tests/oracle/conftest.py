"""Real vLLM engines. Starting one takes many times longer than most tests, so tests share those of equal settings."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import assert_empty
from tests.oracle.reference import Written, greedy

# The models are so small that a second thread costs more than it brings, on a busy machine many times more.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

KEPT = 3
"""Engines of the random pair that are kept at most: an idle one takes hardly any time, but memory."""


@pytest.fixture(scope="session")
def demo_pair() -> pairs.Served:
    return pairs.demo()


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Served:
    return pairs.random_pair(tmp_path_factory.mktemp("random-pair"))


def started(served: pairs.Served, settings: dict[str, Any]) -> Engine:
    """An engine that has done something: before that it gives no account of itself."""
    engine = Engine(served.config(**settings))
    engine.generate([GenerationRequest("first", [1], SamplingSpec(max_tokens=1))])
    return engine


@pytest.fixture(scope="session")
def kept_engines(random_pair: pairs.Served) -> Iterator[Callable[[dict[str, Any]], Engine]]:
    kept: dict[str, Engine] = {}

    def get(settings: dict[str, Any]) -> Engine:
        key = repr(sorted(settings.items()))
        engine = kept.pop(key, None)
        if engine is None:
            if len(kept) == KEPT:
                kept.pop(next(iter(kept))).shutdown()
            engine = started(random_pair, settings)
        kept[key] = engine  # at the end: the one that was not used for longest goes first
        return engine

    yield get
    for engine in kept.values():
        engine.shutdown()


@pytest.fixture
def engine_of(
    random_pair: pairs.Served,
    kept_engines: Callable[[dict[str, Any]], Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Engine]]:
    """``engine_of(**settings)``: an engine of the random pair with these settings of ``Served.config``.

    Others may have used it, so its counters do not begin at zero, and its prefix cache may know ``prompts``. Every test
    leaves it empty, which is checked, and one with worker processes leaves no sockets behind.
    """
    used: list[Engine] = []
    with ExitStack() as stack:

        def get(**settings: Any) -> Engine:
            # Workers that are processes of their own take time also when they are idle.
            own = settings.get("executor") == "mp"
            if own:
                monkeypatch.setenv("TMPDIR", str(tmp_path))
            engine = stack.enter_context(started(random_pair, settings)) if own else kept_engines(settings)
            used.append(engine)
            return engine

        yield get
        for engine in used:
            assert_empty(engine)
    assert not [file for file in tmp_path.iterdir() if file.is_socket()]


@pytest.fixture
def plain_engine(engine_of: Callable[..., Engine]) -> Engine:
    """The random pair with nothing special: lockstep, prefix caching, plenty of KV memory."""
    return engine_of()


@pytest.fixture(scope="session")
def twin_engine(random_pair: pairs.Served) -> Iterator[Engine]:
    """No gate. Lane 1 is the random pair's expert; lane 2 is the base's twin, so that whatever the base drafts stands.

    The base drafts ahead as far as a request may go; nothing but that makes an expert's step wait.
    """
    twins = dataclasses.replace(random_pair, experts={**random_pair.experts, "twin": random_pair.base})
    scheduler = {"run_ahead": 12, "gather": "off", "gather_max_wait_seconds": 60.0}
    with Engine(twins.config(scheduler=scheduler, gate=False)) as engine:
        engine.generate([GenerationRequest("first", [1], SamplingSpec(max_tokens=1), Collaboration(policy="never"))])
        yield engine


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """50 prompts of 1 to 70 tokens of the random pair's vocabulary."""
    draw = random.Random(7)
    return [[draw.randrange(1, 512) for _ in range(draw.randrange(1, 70))] for _ in range(50)]


@pytest.fixture(scope="session")
def written(random_pair: pairs.Served, prompts: list[list[int]]) -> list[Written]:
    """What the oracle writes for ``prompts``: up to 50 tokens."""
    return [greedy(random_pair.reference, prompt, 50) for prompt in prompts]


@pytest.fixture(scope="session")
def demo_questions() -> list[list[int]]:
    """50 held-out questions of the demo pair, spread over all its tasks, as token ids."""
    tokenizer = Tokenizer.from_file(str(pairs.DEMO / "base" / "tokenizer.json"))
    questions = [item for item in json.loads((pairs.DEMO / "questions.json").read_text()) if item["split"] == "test"]
    return [tokenizer.encode(item["prompt"]).ids for item in questions[:: len(questions) // 50][:50]]

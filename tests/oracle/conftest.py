"""Real vLLM engines, one at a time where memory counts, shared where tests can share."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from engine.client import Engine
from tests.oracle import pairs
from tests.oracle.reference import Written, greedy

# The models are so small that a second thread costs more than it brings, on a busy machine many times more.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_pair() -> pairs.Served:
    return pairs.demo()


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Served:
    return pairs.random_pair(tmp_path_factory.mktemp("random-pair"))


@pytest.fixture(scope="session")
def plain_engine(random_pair: pairs.Served) -> Iterator[Engine]:
    """The random pair with nothing special: lockstep, prefix caching, plenty of KV memory."""
    with Engine(random_pair.config()) as engine:
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

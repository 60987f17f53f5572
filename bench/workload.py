"""What is asked for: cells, and the jobs in them. All contenders get the same jobs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from bench.shapes import Pair

Deferral = float | Literal["gate"]
"""A rate at which deferrals are forced, 0 to 1, or "gate": the pair's own gate decides."""

PROMPT_TOKENS = {"short": 32, "long": 512, "2k": 2048, "8k": 8000}
"""The last one and its answer fit into the synthetic models' context of 8,192 tokens."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; greedy by default."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}" if self.temperature else "greedy"


GREEDY = Sampling()


@dataclass(frozen=True)
class Cell:
    """One combination that is measured.

    Attributes:
        concurrency: requests in flight at any time.
        prompt: its length by name, see PROMPT_TOKENS.
    """

    concurrency: int
    deferral: Deferral
    prompt: str = "short"

    def __str__(self) -> str:
        return f"c{self.concurrency}, deferral {self.deferral}, {self.prompt} prompts"


@dataclass(frozen=True)
class Job:
    """One request: exactly ``max_tokens`` tokens, whatever is written.

    Attributes:
        seed: decides, with the position, what is drawn, and which tokens are deferred where deferrals are forced.
    """

    name: str
    prompt: list[int]
    max_tokens: int
    deferral: Deferral
    seed: int
    sampling: Sampling = GREEDY


def make_jobs(
    pair: Pair,
    cell: Cell,
    count: int,
    max_tokens: int,
    seed: int,
    round_number: int,
    sampling: Sampling = GREEDY,
) -> list[Job]:
    """A cell's jobs of one round; another round has other prompts, so that no prefix is cached from the last one.

    Args:
        seed: of the whole run.
        round_number: the round's number.
    """
    draw = random.Random(f"{seed} {round_number} {cell.concurrency} {cell.deferral} {cell.prompt}")
    jobs = []
    for number in range(count):
        if pair.prompts and cell.prompt == "short":
            prompt = list(draw.choice(pair.prompts))
        else:
            prompt = [draw.randrange(1, pair.vocab_size) for _ in range(PROMPT_TOKENS[cell.prompt])]
        jobs.append(
            Job(
                f"{round_number}-{cell}-{number}", prompt, max_tokens, cell.deferral, draw.randrange(1 << 62), sampling
            ),
        )
    return jobs

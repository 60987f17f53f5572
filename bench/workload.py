"""What is asked for: cells, and the jobs in them. All contenders get the same jobs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from bench.shapes import Pair

Deferral = float | Literal["gate"]
"""A rate at which deferrals are forced, 0 to 1, or "gate": the pair's own gate decides."""

PROMPT_TOKENS = {"short": 32, "long": 512}


@dataclass(frozen=True)
class Cell:
    """One combination that is measured.

    Attributes:
        concurrency: requests in flight at any time.
        prompt: "short" or "long", see PROMPT_TOKENS.
    """

    concurrency: int
    deferral: Deferral
    prompt: str = "short"

    def __str__(self) -> str:
        return f"c{self.concurrency}, deferral {self.deferral}, {self.prompt} prompts"


@dataclass(frozen=True)
class Job:
    """One request: greedy, exactly ``max_tokens`` tokens, whatever is written.

    Attributes:
        seed: decides, with the position, which tokens are deferred where deferrals are forced.
    """

    name: str
    prompt: list[int]
    max_tokens: int
    deferral: Deferral
    seed: int


def make_jobs(pair: Pair, cell: Cell, count: int, max_tokens: int, seed: int, round_number: int) -> list[Job]:
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
            Job(f"{round_number}-{cell}-{number}", prompt, max_tokens, cell.deferral, draw.randrange(1 << 62)),
        )
    return jobs

"""The closed-loop load generator: a fixed number of requests in flight, the next one when one has finished."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.contenders.base import Contender
from bench.errors import BenchError
from bench.http_client import HttpError
from bench.workload import Job


@dataclass(frozen=True)
class Outcome:
    """What one contender did with one list of jobs. Times in seconds.

    Attributes:
        seconds: from the first job's beginning to the last one's end.
        first: each job's time to its first token.
        gaps: times between consecutive arrivals within a job, of all jobs.
        arrivals: how many; fewer than tokens where several came together.
    """

    seconds: float
    tokens: int
    first: list[float]
    gaps: list[float]
    arrivals: int

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all requests together."""
        return self.tokens / self.seconds


async def drive(
    contender: Contender,
    jobs: Sequence[Job],
    concurrency: int,
    on_done: Callable[[Job], None] = lambda _: None,
) -> Outcome:
    """Run all jobs, ``concurrency`` at a time.

    Raises:
        BenchError: a job failed, or did not write the number of tokens that it should.
    """
    waiting = iter(jobs)
    first: list[float] = []
    gaps: list[float] = []
    written = arrivals = 0

    async def place() -> None:
        nonlocal written, arrivals
        for job in waiting:
            begin = time.perf_counter()
            stamps: list[float] = []
            try:
                tokens = await contender.run(job, lambda stamps=stamps: stamps.append(time.perf_counter()))  # type: ignore[misc]
            except HttpError as error:
                raise BenchError(f"{contender.name}: {job.name}: {error}") from error
            if tokens != job.max_tokens:
                raise BenchError(f"{contender.name}: {job.name}: {tokens} tokens instead of {job.max_tokens}")
            if not stamps:
                raise BenchError(f"{contender.name}: {job.name}: nothing was streamed")
            first.append(stamps[0] - begin)
            gaps.extend(after - before for before, after in itertools.pairwise(stamps))
            written += tokens
            arrivals += len(stamps)
            on_done(job)

    begin = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(jobs))):
                group.create_task(place())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return Outcome(time.perf_counter() - begin, written, first, gaps, arrivals)

"""The engine's own time per token with nothing of it left in the processor's caches: a program of its own.

    python -m bench.cold_caches < TASK

Attention over a long context sweeps the caches, and the engine's own data with them, so that its own work takes longer
after a long step than after a short one although it is the same. Here the caches are swept after every step, so that
what still grows with the context is work. The task and the result are JSON, see :class:`Task`; the result, on the
output's last line, gives microseconds per token for each length, one value per round.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from bench.errors import BenchError
from bench.shapes import REPOSITORY
from bench.workload import Deferral, Job

SWEEP_BYTES = 256 << 20
"""Read after every step. Many times the last-level cache of common processors: less leaves some of them warm."""


@dataclass(frozen=True)
class Task:
    """What is to be measured.

    Attributes:
        config: an :class:`engine.config.EngineConfig`, as JSON would have it.
        vocab_size: prompts are drawn from it.
        lengths: of prompts, in tokens.
        max_tokens: what is written after each.
    """

    config: dict[str, Any]
    vocab_size: int
    lengths: list[int]
    concurrency: int
    deferral: Deferral
    max_tokens: int
    rounds: int
    seed: int


def prompts(task: Task, round_number: int, length: int) -> list[Job]:
    """One round's jobs of one length; no two share a prefix."""
    draw = random.Random(f"{task.seed} {round_number} {length}")
    return [
        Job(
            f"{round_number}-{length}-{number}",
            [draw.randrange(1, task.vocab_size) for _ in range(length)],
            task.max_tokens,
            task.deferral,
            draw.randrange(1 << 62),
        )
        for number in range(task.concurrency)
    ]


async def measure(task: Task) -> dict[int, list[float]]:
    """Run the program: microseconds per token by length, one value per round.

    Raises:
        BenchError: it failed; with the last line of what it printed.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, cwd=REPOSITORY,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await process.communicate(json.dumps(asdict(task)).encode())
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        last = (err.decode(errors="replace").splitlines() or ["no message"])[-1]
        raise BenchError(f"the measurement with cold caches failed: {last}")
    return {int(length): values for length, values in json.loads(out.splitlines()[-1]).items()}


class _Stopwatch:
    """The engine in this process, and its own time: all that is neither a lane's step nor a sweep."""

    def __init__(self, config: dict[str, Any]) -> None:
        # After the command line's own imports: these load torch and vLLM.
        import numpy as np

        from engine.config import EngineConfig
        from engine.loop import StepLoop
        from engine.process import build

        self._scheduler, self._lanes, _, pacer = build(
            EngineConfig.model_validate(config),
            on_progress=lambda _: None,
            on_ready=lambda: None,
            on_failure=lambda _: None,
        )
        self._loop = StepLoop(self._scheduler, self._lanes, "lockstep", pacer)
        self._swept = np.ones(SWEEP_BYTES // 8)
        self._elsewhere = 0.0
        for lane in self._lanes:
            setattr(lane, "start", self._sweeping(lane.start))  # noqa: B010 - a method, on the instance

    def _sweeping(self, start: Any) -> Any:
        def start_and_sweep() -> Any:
            begin = time.perf_counter()
            future = start()
            self._swept.sum()
            self._elsewhere += time.perf_counter() - begin
            return future

        return start_and_sweep

    def run(self, jobs: list[Job]) -> float:
        """Microseconds per token, from the last job's first token to the first job's last one.

        Raises:
            BenchError: there was no such stretch.
        """
        from bench.contenders.engine_alone import engine_request
        from engine.messages import Batch

        encoder = msgspec.msgpack.Encoder()
        for job in jobs:
            self._scheduler.add(engine_request(job))
        begun: set[str] = set()
        tokens, own = 0, 0.0
        ended = False
        while not self._scheduler.idle:
            begin, elsewhere = time.perf_counter(), self._elsewhere
            self._loop.step()
            deltas = self._scheduler.take_deltas()
            encoder.encode(Batch(deltas, self._loop.stats()))
            spent = time.perf_counter() - begin - (self._elsewhere - elsewhere)
            ended = ended or any(delta.finish_reason for delta in deltas)
            if len(begun) == len(jobs) and not ended:
                tokens += sum(len(delta.tokens) for delta in deltas)
                own += spent
            begun.update(delta.request_id for delta in deltas if delta.tokens)
        if not tokens:
            raise BenchError("a request ended before the last prompt was read: --max-tokens is too few")
        return 1e6 * own / tokens

    def close(self) -> None:
        """Shut the lanes down."""
        self._loop.shutdown()


def main() -> int:
    """Entry point; returns the exit status."""
    task = Task(**json.load(sys.stdin))
    stopwatch = _Stopwatch(task.config)
    found: dict[int, list[float]] = {length: [] for length in task.lengths}
    try:
        for round_number in range(-1, task.rounds):
            for length in task.lengths:
                microseconds = stopwatch.run(prompts(task, round_number, length))
                if round_number >= 0:
                    found[length].append(microseconds)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        stopwatch.close()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The engine's own time per token as the context grows: it should not grow, since nothing of ours walks the context.

Measured twice: as it is, and with the processor's caches swept after every step (:mod:`bench.cold_caches`). As it is,
longer steps leave less of the engine's data in the caches.
"""

from __future__ import annotations

from copy import deepcopy

from bench import cold_caches, processes
from bench.account import Account
from bench.cold_caches import Task
from bench.contenders.engine_alone import EngineAlone, EngineService, engine_config
from bench.coordination import account_record
from bench.errors import BenchError
from bench.load import drive
from bench.progress import Progress
from bench.report import Bar, Report, spread, table
from bench.services import running
from bench.settings import Settings
from bench.workload import Deferral
from engine.stats import EngineStats
from engine.types import Delta

CONTEXTS = (128, 512, 1024, 2048, 4096)
"""Prompt lengths in tokens."""
GROWTH_BAR = 1.25
"""Greatest ratio of the engine's own time per token with cold caches, longest context to shortest: 1 but for the
clocks."""
SHARE_BAR = 1.0
"""Greatest ratio of the coordination share, longest context to shortest."""


class DecodeWindow:
    """The engine's account between the batch that brings the last job's first token and the first job's last one.

    Args:
        service: whose batches are watched.

    Attributes:
        account: None before the end.
        cpu_seconds: the engine's processor time in between.
    """

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self.begin(0)

    def begin(self, jobs: int) -> None:
        """The next ``jobs`` requests, all at once, are watched."""
        self._jobs = jobs
        self._begun: set[str] = set()
        self._before: Account | None = None
        self._cpu_before = 0.0
        self.account: Account | None = None
        self.cpu_seconds = 0.0

    def note(self, deltas: list[Delta], _stats: EngineStats) -> None:
        """Take in a batch; for ``EngineClient.on_batch``, after the service's own."""
        if self._before is not None and self.account is None and any(delta.finish_reason for delta in deltas):
            self.account = deepcopy(self._service.account).since(self._before)
            self.cpu_seconds = processes.cpu_seconds(self._service.pid) - self._cpu_before
        self._begun.update(delta.request_id for delta in deltas if delta.tokens)
        if self._before is None and len(self._begun) == self._jobs:
            self._before = deepcopy(self._service.account)
            self._cpu_before = processes.cpu_seconds(self._service.pid)


async def measure(
    settings: Settings,
    lengths: list[int],
    *,
    concurrency: int,
    deferral: Deferral,
    rounds: int,
    max_tokens: int,
    seed: int,
) -> Report:
    """Decode after prompts of each length, in every round; prompts themselves are not in the numbers.

    Args:
        lengths: of prompts, in tokens, shortest first.
    """
    config = engine_config(settings)
    task = Task(
        config.model_dump(mode="json"),
        settings.pair.vocab_size,
        lengths,
        concurrency,
        deferral,
        max_tokens,
        rounds,
        seed,
    )
    service = EngineService(config)
    contender = EngineAlone(service)
    window = DecodeWindow(service)
    found: dict[int, list[Account]] = {length: [] for length in lengths}
    with Progress(rounds * len(lengths) + 1, "context") as progress:
        async with running([service], lambda name: progress.say(f"starting {name}")):
            processes.thaw(service.pid)
            service.client.on_batch(window.note)
            for round_number in range(-1, rounds):
                for length in lengths:
                    progress.say(f"{settings.pair.name}, prompts of {length} tokens")
                    jobs = cold_caches.prompts(task, round_number, length)
                    window.begin(concurrency)
                    await drive(contender, jobs, concurrency)
                    if window.account is None or not window.account.tokens:
                        raise BenchError(
                            f"a request ended before the last prompt of {length} tokens was read: "
                            f"--max-tokens {max_tokens} is too few"
                        )
                    if round_number >= 0:
                        found[length].append(window.account)
                        progress.step()
        progress.say(f"{settings.pair.name}, with cold caches")
        cold = await cold_caches.measure(task)
        progress.step()
    return _report(settings, found, cold, concurrency, deferral, max_tokens)


def _report(
    settings: Settings,
    found: dict[int, list[Account]],
    cold: dict[int, list[float]],
    concurrency: int,
    deferral: Deferral,
    max_tokens: int,
) -> Report:
    rows = [
        [
            f"{length}",
            spread([1e6 * window.loop_seconds / window.tokens for window in windows]),
            spread([window.own_microseconds_per_token for window in windows], 1),
            spread(cold[length], 1),
            spread([window.share for window in windows], 1, 100, " %"),
        ]
        for length, windows in found.items()
    ]
    text = (
        f"### Context, {settings.pair.title}, engine alone, concurrency {concurrency}, deferral {deferral}, "
        f"{max_tokens} tokens after each prompt\n\n"
        + table(["prompt tokens", "us/token", "of it the engine's own", "with cold caches", "coordination share"], rows)
    )
    shortest, longest = min(found), max(found)
    bars = []
    if longest > shortest:
        ends = f"context {longest} / {shortest}"
        growth = [long / short for short, long in zip(cold[shortest], cold[longest], strict=True)]
        name = f"{settings.pair.name}: engine's own time per token, cold caches, {ends}"
        bars.append(Bar(name, GROWTH_BAR, tuple(growth), at_most=True))
        shares = [long.share / short.share for short, long in zip(found[shortest], found[longest], strict=True)]
        bars.append(Bar(f"{settings.pair.name}: coordination share, {ends}", SHARE_BAR, tuple(shares), at_most=True))
    data = {
        "measurement": "context",
        "shape": settings.pair.name,
        "concurrency": concurrency,
        "deferral": deferral,
        "max_tokens": max_tokens,
        "contexts": {length: [account_record(window) for window in windows] for length, windows in found.items()},
        "cold_microseconds_per_token": cold,
    }
    return Report(text, data, bars)

"""Ways of doing the same work, measured in turn: every cell in every way, round after round, one engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from bench import processes
from bench.account import Account
from bench.contenders.engine_alone import EngineAlone
from bench.load import Outcome, drive
from bench.progress import Progress
from bench.services import running
from bench.settings import Settings
from bench.workload import Cell, make_jobs

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Measured:
    """One way's work in one cell and one round.

    Attributes:
        account: the engine's, of this work alone.
        cpu_seconds: processor time of the engine's process, which other work on the machine changes least.
        resident_bytes: of the engine's process, afterwards.
    """

    outcome: Outcome
    account: Account
    cpu_seconds: float
    resident_bytes: int

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.outcome.tokens_per_second

    @property
    def cpu_per_token(self) -> float:
        """Processor seconds per token."""
        return self.cpu_seconds / self.account.tokens


SPEED, CPU = attrgetter("speed"), attrgetter("cpu_per_token")
"""Figures for :func:`ratios`."""

Found = dict[tuple[Cell, str], list[Measured]]
"""By cell and name of the way, one for each round."""


def ratios(ones: Sequence[Measured], others: Sequence[Measured], of: Callable[[Measured], float]) -> list[float]:
    """One way's figure over another's, round by round."""
    return [of(one) / of(other) for one, other in zip(ones, others, strict=True)]


async def in_turn(
    title: str,
    ways: Sequence[EngineAlone],
    cells: Sequence[Cell],
    settings: Settings,
    *,
    rounds: int,
    requests: int,
    max_tokens: int,
    seed: int,
) -> Found:
    """Start the ways' engines and measure. A first round more is not counted: everything is compiled and learnt in it.

    Args:
        ways: by different names; several may have one engine.
        requests: jobs for each place, so that a cell has ``requests`` x concurrency of them.
    """
    services = {id(service): service for way in ways for service in way.services}
    found: Found = {}
    with Progress((1 + rounds) * len(cells) * len(ways), f"{title} {settings.pair.name}") as progress:
        async with running(list(services.values()), lambda name: progress.say(f"starting {name}")):
            for round_number in range(-1, rounds):
                for cell in cells:
                    for number, way in enumerate(ways):
                        progress.say(f"round {round_number + 1}: {way.name}, {cell}")
                        (service,) = way.services
                        processes.thaw(service.pid)
                        # Every way has jobs of its own: one engine serves several, and knows the prompts it has seen.
                        draw = round_number * len(ways) + number
                        warm_up = make_jobs(settings.pair, cell, cell.concurrency, _WARM_UP_TOKENS, seed + 1, draw)
                        await drive(way, warm_up, cell.concurrency)
                        jobs = make_jobs(settings.pair, cell, cell.concurrency * requests, max_tokens, seed, draw)
                        before, cpu = way.account(), processes.cpu_seconds(service.pid)
                        outcome = await drive(way, jobs, cell.concurrency)
                        if round_number >= 0:
                            measured = Measured(
                                outcome,
                                way.account().since(before),
                                processes.cpu_seconds(service.pid) - cpu,
                                processes.rss_bytes(service.pid),
                            )
                            found.setdefault((cell, way.name), []).append(measured)
                        processes.freeze(service.pid)
                        progress.step()
    return found

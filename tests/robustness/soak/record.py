"""What was measured, and whether it is as it should be."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.robustness.servers import FaultServer
from tests.waiting import eventually

SAMPLE_SECONDS = 2.0
WARM_SHARE = 1 / 4
"""The first share of the pauses is warming up: allocators and caches find their size."""
MEMORY_GROWTH = 0.04
"""Of resident memory at rest that is still noise, between the first half and the second half of the warm pauses."""
DESCRIPTOR_GROWTH = 4


@dataclass
class Sample:
    """One look at the server. Memory in bytes; lists are of the HTTP process and the engine's."""

    seconds: float
    memory: list[int]
    descriptors: list[int]
    kv_usage: dict[str, float]
    running: float
    waiting: float


@dataclass
class Record:
    """Everything that a run brought.

    Attributes:
        sent: requests sent during the load.
        completed: choices that were answered to their end, those of the oracle included.
        abandoned: requests that their clients left.
        checked: answers that were compared with an earlier one.
        latencies: (seconds since the start, kind, seconds) of every request.
    """

    begin: float = field(default_factory=time.monotonic)
    sent: int = 0
    completed: int = 0
    abandoned: int = 0
    checked: int = 0
    tokens: int = 0
    response_ids: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    latencies: list[tuple[float, str, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    rests: list[Sample] = field(default_factory=list)
    outcomes: dict[str, float] = field(default_factory=dict)
    server_tokens: float = 0.0
    integrity_errors: float = 0.0
    exit_status: int | None = None

    @property
    def now(self) -> float:
        return time.monotonic() - self.begin

    def fail(self, what: str) -> None:
        self.failures.append(f"{self.now:.0f} s: {what}")

    def ended(self, kind: str, begin: float) -> None:
        self.latencies.append((self.now, kind, time.monotonic() - begin))

    def account(self, server: FaultServer) -> None:
        """The server's own account, at the end."""
        self.outcomes = {name: server.outcomes(name) for name in ("stop", "length", "aborted", "error", "rejected")}
        now = server.metrics()
        self.server_tokens = sum(value for name, value in now.items() if name.startswith("collm_tokens_total"))
        self.integrity_errors = now.get("collm_integrity_errors_total{}", 0.0)

    @property
    def warm(self) -> list[Sample]:
        """Pauses after the warm-up."""
        return self.rests[int(len(self.rests) * WARM_SHARE) :]

    def growth(self, process: int) -> float:
        """Relative growth of a process's memory at rest, first half of the warm pauses to the second."""
        memory = [sample.memory[process] for sample in self.warm]
        half = len(memory) // 2
        return statistics.median(memory[half:]) / statistics.median(memory[: half or 1]) - 1

    def problems(self) -> list[str]:
        """Why the run has not passed; empty if it has."""
        found = list(dict.fromkeys(self.failures))[:20]
        finished = self.outcomes["stop"] + self.outcomes["length"]
        # One that is abandoned may have been finished by then; nothing else may be more or less than was answered.
        if not self.completed <= finished <= self.completed + self.abandoned:
            found.append(f"{self.completed} choices were answered to the end, the server finished {finished:.0f}")
        if self.outcomes["aborted"] > self.abandoned:
            found.append(f"{self.outcomes['aborted']:.0f} were aborted, {self.abandoned} abandoned")
        for outcome in ("error", "rejected"):
            if self.outcomes[outcome]:
                found.append(f"{self.outcomes[outcome]:.0f} requests ended as {outcome}")
        if self.server_tokens < self.tokens:
            found.append(f"{self.tokens} tokens were received, the server counted {self.server_tokens:.0f}")
        if self.integrity_errors:
            found.append(f"{self.integrity_errors:.0f} leftovers in idle lanes")
        if self.exit_status != 0:
            found.append(f"exit status {self.exit_status}")
        for process, name in enumerate(("HTTP process", "engine process")):
            if (growth := self.growth(process)) > MEMORY_GROWTH:
                found.append(f"memory of the {name} grew by {growth:.1%}")
            descriptors = [sample.descriptors[process] for sample in self.warm]
            if max(descriptors) - descriptors[0] > DESCRIPTOR_GROWTH:
                found.append(f"descriptors of the {name} grew: {descriptors}")
        for sample in self.rests:
            if any(sample.kv_usage.values()) or sample.running or sample.waiting:
                found.append(f"at rest, {sample.seconds:.0f} s: {sample}")
        return found

    def figures(self) -> dict[str, Any]:
        """The run in numbers."""
        seconds = sorted(latency for _, kind, latency in self.latencies if kind in ("known", "seeded"))
        return {
            "minutes": round(self.now / 60, 1),
            "requests": self.sent,
            "choices_completed": self.completed,
            "abandoned": self.abandoned,
            "checked_against_oracle": self.checked,
            "tokens": self.tokens,
            "failures": len(self.failures),
            "kinds": dict(Counter(kind for _, kind, _ in self.latencies)),
            "latency_short_requests_s": {
                f"p{q}": round(seconds[int(len(seconds) * q / 100)], 2) for q in (50, 90, 99) if seconds
            },
            "pauses": len(self.rests),
            "memory_at_rest_mib": {
                name: [round(sample.memory[process] / (1 << 20)) for sample in (self.warm[0], self.warm[-1])]
                for process, name in enumerate(("http", "engine"))
            },
            "memory_growth_when_warm": {
                name: f"{self.growth(process):+.2%}" for process, name in enumerate(("http", "engine"))
            },
            "descriptors_at_rest": {
                name: [sample.descriptors[process] for sample in (self.warm[0], self.warm[-1])]
                for process, name in enumerate(("http", "engine"))
            },
            "kv_usage_at_rest": max(max(sample.kv_usage.values()) for sample in self.rests),
            "kv_usage_under_load": max(max(sample.kv_usage.values()) for sample in self.samples),
            "server_outcomes": self.outcomes,
            "integrity_errors": self.integrity_errors,
            "exit_status": self.exit_status,
        }


class Watch:
    """Looks at the server every few seconds, in a thread, and at every pause."""

    def __init__(self, server: FaultServer, record: Record) -> None:
        self._server = server
        self._record = record
        self._processes = [server.parent(), server.engine()]
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._record.begin = time.monotonic()
        self._task = asyncio.create_task(self._sample())

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def at_rest(self) -> None:
        """Wait until the server says that it is idle, then look."""
        await asyncio.to_thread(eventually, self._server.is_empty)
        self._record.rests.append(await asyncio.to_thread(self._look))

    async def _sample(self) -> None:
        while True:
            self._record.samples.append(await asyncio.to_thread(self._look))
            await asyncio.sleep(SAMPLE_SECONDS)

    def _look(self) -> Sample:
        now = self._server.metrics()
        prefix = "collm_lane_kv_cache_usage_ratio{lane="
        return Sample(
            self._record.now,
            [process.memory_info().rss for process in self._processes],
            [process.num_fds() for process in self._processes],
            {name.removeprefix(prefix)[:-1]: value for name, value in now.items() if name.startswith(prefix)},
            now["collm_requests_running{}"],
            now["collm_requests_waiting{}"],
        )

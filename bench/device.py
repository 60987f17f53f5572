"""How busy a device is kept: the engine's own scheduler and loop on a virtual clock, with lanes on one device.

A step takes the host some time before it is launched and some when it is finished, and the device some time in between.
Until there is a measurement on a GPU the times are reckoned (:data:`RECKONED`): a base of 1 B parameters and an expert
of 8 B on one H100, in bfloat16.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bench.contenders.engine_alone import engine_request
from bench.cost_model import CONTEXT, AgreeingLane, Clock, StepTime
from bench.queued import QueuedLane
from bench.report import Report, table
from bench.workload import Job
from engine.lanes.interface import Lane, LaneReport
from engine.loop import StepLoop
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.strategies.deferral.pacing import Pacer
from engine.types import BASE, RunAhead

DEPTHS = {"each step waited for": 0, "lanes interleaved": 1, "base looks ahead too": 2}
"""Values of ``scheduler.steps_in_flight``."""


@dataclass(frozen=True)
class HostAndDevice:
    """What a lane's step takes.

    Attributes:
        device: of the device.
        launch: of the host before the step is launched: schedule, inputs.
        finish: of the host once the device is done: samples, bookkeeping.
    """

    device: StepTime
    launch: StepTime
    finish: StepTime


@dataclass(frozen=True)
class Costs:
    """A pair on one device.

    Attributes:
        own: the engine's own time for each step and for each of its rows: land, plan, send.
    """

    base: HostAndDevice
    expert: HostAndDevice
    own: StepTime


RECKONED = Costs(
    HostAndDevice(
        StepTime(1.2e-3, 0.0, 4.3e-6), launch=StepTime(0.62e-3, 0.0, 7.5e-6), finish=StepTime(0.14e-3, 0.0, 1.8e-6)
    ),
    HostAndDevice(
        StepTime(8.0e-3, 0.0, 26e-6), launch=StepTime(0.8e-3, 0.0, 16e-6), finish=StepTime(0.2e-3, 0.0, 4e-6)
    ),
    own=StepTime(0.1e-3, 0.0, 7e-6),
)
"""Of a base step with 1, 32, 256 rows the device takes 1.2, 1.4, 2.3 ms, vLLM on the host 0.7, 1.0, 3.0 ms and the
engine 0.1, 0.3, 1.9 ms: read off vLLM's code, and off this engine's account on a CPU."""


HOSTS = {
    "as reckoned": (1.0, 1.0),
    "half of the engine's own": (0.5, 1.0),
    "half of vLLM's": (1.0, 0.5),
    "half": (0.5, 0.5),
}
"""Times of the host, by what is left of the engine's own and of vLLM's."""


def with_host(costs: Costs, own: float, of_vllm: float) -> Costs:
    """The same device under another host: its times multiplied by ``own`` (the engine's) and ``of_vllm``."""

    def times(cost: StepTime, factor: float) -> StepTime:
        return StepTime(cost.fixed * factor, cost.token * factor, cost.row * factor)

    def lane(cost: HostAndDevice) -> HostAndDevice:
        return HostAndDevice(cost.device, times(cost.launch, of_vllm), times(cost.finish, of_vllm))

    return Costs(lane(costs.base), lane(costs.expert), times(costs.own, own))


class Device:
    """Computes steps one after the other, each as soon as it is launched and the ones before it are done."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = 0.0
        self.busy = 0.0

    def launch(self, seconds: float) -> float:
        """When a step that is launched now will be done."""
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self.busy += seconds
        return self._free_at


class DeviceLane(AgreeingLane, QueuedLane):
    """A stand-in on a device and a clock."""

    def __init__(
        self, number: int, costs: HostAndDevice, device: Device, clock: Clock, depth: int, agreement: float
    ) -> None:
        super().__init__(number, agreement, depth=depth, token_budget=8192)
        self._costs = costs
        self._device = device
        self._clock = clock
        self._ends: deque[float] = deque()
        self.rows = 0
        self.steps = 0

    def _launch(self, report: LaneReport) -> None:
        begin = self._clock.now
        self._clock.now += self._costs.launch.seconds(report.tokens, report.rows)
        report.device_seconds = self._costs.device.seconds(report.tokens, report.rows)
        self._ends.append(self._device.launch(report.device_seconds))
        report.seconds = self._clock.now - begin

    def _wait(self, report: LaneReport) -> None:
        begin = self._clock.now
        self._clock.now = max(begin, self._ends.popleft())
        self._clock.now += self._costs.finish.seconds(report.tokens, report.rows)
        report.seconds += self._clock.now - begin
        self.rows += report.rows
        self.steps += 1


@dataclass(frozen=True)
class Kept:
    """What came out; seconds of the virtual clock.

    Attributes:
        busy: share of the time in which the device computed.
    """

    tokens_per_second: float
    busy: float
    steps: tuple[int, int]


def simulate(
    costs: Costs,
    jobs: Sequence[Job],
    concurrency: int,
    depth: int,
    *,
    run_ahead: RunAhead = "auto",
    agreement: float = 0.7,
) -> Kept:
    """Run jobs, ``concurrency`` at a time, the next one when one has finished.

    Args:
        jobs: with forced deferrals.
        depth: ``scheduler.steps_in_flight``.
        agreement: how often base and expert write the same token, 0 to 1.
    """
    clock = Clock()
    device = Device(clock)
    lanes = [
        DeviceLane(0, costs.base, device, clock, depth, agreement),
        DeviceLane(1, costs.expert, device, clock, min(depth, 1), agreement),
    ]
    pacer = Pacer(2, clock=clock)
    scheduler = Scheduler(
        lanes=2,
        max_num_seqs=concurrency,
        max_model_len=CONTEXT,
        eos_token_ids=(),
        strategy=Strategies(2, has_gate=False, policy="random", run_ahead=run_ahead, draft_pays=pacer.draft_pays),
        clock=clock,
    )
    plain: list[Lane] = list(lanes)
    loop = StepLoop(scheduler, plain, "lockstep", pacer)
    waiting = (engine_request(job) for job in jobs)
    for request in itertools.islice(waiting, concurrency):
        scheduler.add(request)
    tokens = 0
    landed = (0, 0)
    while loop.step() or not scheduler.idle:
        for delta in scheduler.take_deltas():
            tokens += len(delta.tokens)
            if delta.finish_reason is not None:
                assert delta.error is None, delta.error
                for request in itertools.islice(waiting, 1):
                    scheduler.add(request)
        steps, rows = sum(lane.steps for lane in lanes), sum(lane.rows for lane in lanes)
        clock.now += costs.own.fixed * (steps - landed[0]) + costs.own.row * (rows - landed[1])
        landed = (steps, rows)
    return Kept(tokens / clock.now, device.busy / clock.now, (lanes[BASE].steps, lanes[1].steps))


def measure(concurrencies: Sequence[int], deferrals: Sequence[float], requests: int, max_tokens: int) -> Report:
    """Tokens per second and the device's busy share by ``steps_in_flight``, and what the host's time is worth."""
    rows = []
    cells = []
    for concurrency in concurrencies:
        for deferral in deferrals:
            jobs = _jobs(requests * concurrency, max_tokens, deferral)
            for name, depth in DEPTHS.items():
                kept = simulate(RECKONED, jobs, concurrency, depth)
                rows.append(
                    [f"{concurrency}, {deferral:g}", name, f"{kept.tokens_per_second:,.0f}", f"{kept.busy:.0%}"]
                )
                cells.append(
                    {
                        "concurrency": concurrency,
                        "deferral": deferral,
                        "steps_in_flight": depth,
                        "tokens_per_second": kept.tokens_per_second,
                        "busy": kept.busy,
                        "steps": kept.steps,
                    }
                )
    text = "### Device, reckoned costs of 1B-8B on an H100, virtual clock\n\n" + table(
        ["concurrency, deferral", "steps in flight", "tokens/s", "device busy"], rows
    )
    rows, hosts = [], []
    concurrency = max(concurrencies)
    for deferral in deferrals:
        jobs = _jobs(requests * concurrency, max_tokens, deferral)
        for name, (own, of_vllm) in HOSTS.items():
            kept = simulate(with_host(RECKONED, own, of_vllm), jobs, concurrency, max(DEPTHS.values()))
            rows.append([f"{concurrency}, {deferral:g}", name, f"{kept.tokens_per_second:,.0f}", f"{kept.busy:.0%}"])
            hosts.append(
                {
                    "concurrency": concurrency,
                    "deferral": deferral,
                    "own": own,
                    "of_vllm": of_vllm,
                    "tokens_per_second": kept.tokens_per_second,
                    "busy": kept.busy,
                }
            )
    text += "\n\nThe base looking ahead, with less time of the host:\n\n" + table(
        ["concurrency, deferral", "the host's time", "tokens/s", "device busy"], rows
    )
    return Report(text, {"measurement": "device", "cells": cells, "hosts": hosts}, [])


def _jobs(count: int, max_tokens: int, deferral: float) -> list[Job]:
    return [Job(f"{number}", [1, number + 1], max_tokens, deferral, number) for number in range(count)]

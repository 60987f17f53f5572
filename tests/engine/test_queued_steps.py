"""Steps that are launched and finished later, rows that look ahead, and how busy that keeps a device."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from typing import Literal

import pytest

from bench.device import DEPTHS, RECKONED, simulate, with_host
from bench.queued import QueuedLane
from bench.workload import Job
from engine.lanes import LaneReport
from engine.lanes.interface import Launched
from engine.lanes.shelf import Shelf
from engine.loop import StepLoop
from engine.scheduler import Scheduler
from engine.strategies.deferral.pacing import Pacer
from engine.types import GenerationRequest
from tests.engine.builders import make_scheduler, mixed_requests, request
from tests.engine.oracle import Ledger, Pair, check

PAIR = Pair(experts=2)


def lanes_of(depths: tuple[int, ...], kind: type[QueuedLane] = QueuedLane, **options: int) -> list[QueuedLane]:
    shelf = Shelf()
    return [
        kind(
            number,
            f"lane-{number}",
            experts=PAIR.experts if number == 0 else 0,
            vocab_size=PAIR.vocab_size,
            max_model_len=PAIR.max_model_len,
            shelf=shelf,
            depth=depth,
            **options,
        )
        for number, depth in enumerate(depths)
    ]


def drive(
    lanes: list[QueuedLane],
    requests: list[GenerationRequest],
    coordination: Literal["lockstep", "overlapped"] = "lockstep",
    aborted: tuple[str, ...] = (),
) -> tuple[Ledger, StepLoop, Scheduler]:
    scheduler = make_scheduler(PAIR)
    loop = StepLoop(scheduler, list(lanes), coordination, Pacer(PAIR.lanes))
    ledger = Ledger()
    for one in requests:
        scheduler.add(one)
    passes = 0
    while loop.step() or not scheduler.idle:
        ledger.take(scheduler.take_deltas())
        passes += 1
        if passes % 3 == 0 and aborted:
            scheduler.abort(aborted[0])
            aborted = aborted[1:]
    ledger.take(scheduler.take_deltas())
    while loop.step():
        pass
    return ledger, loop, scheduler


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
@pytest.mark.parametrize("depths", [(1, 1, 1), (2, 1, 1), (2, 0, 1), (2, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"token_budget": 7, "kv_tokens": 80}])
def test_what_is_written_does_not_depend_on_it(
    coordination: Literal["lockstep", "overlapped"], depths: tuple[int, ...], options: dict[str, int]
) -> None:
    lanes = lanes_of(depths, **options)
    requests = mixed_requests(40, PAIR)
    ledger, loop, _ = drive(lanes, requests, coordination)
    for one in requests:
        check(ledger.got[one.request_id], one, PAIR)
    stats = loop.stats()
    assert (stats.integrity_errors, stats.running) == (0, 0)
    assert [lane.leftovers() for lane in lanes] == [[], [], []]
    if depths[0] > 1:
        assert lanes[0].looked_ahead > 20


@pytest.mark.parametrize("seed", range(3))
def test_aborts_while_steps_are_launched(seed: int) -> None:
    lanes = lanes_of((2, 1, 1))
    requests = mixed_requests(30, PAIR, seed)
    ledger, loop, _ = drive(lanes, requests, aborted=tuple(str(number) for number in range(0, 30, 2)))
    for one in requests:
        check(ledger.got[one.request_id], one, PAIR)
    assert loop.stats().integrity_errors == 0


def test_a_launched_step_that_fails_is_raised() -> None:
    class Failing(QueuedLane):
        def start(self) -> Future[LaneReport]:
            def fail() -> LaneReport:
                raise RuntimeError("illegal memory access")

            return Launched(fail)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        drive(lanes_of((1, 1, 1), Failing), [request()])


def test_order_on_the_device() -> None:
    """The next base step is launched before the last one is landed, and an expert's step goes in between."""
    log: list[str] = []

    class Logged(QueuedLane):
        def start(self) -> Future[LaneReport]:
            log.append(f"+{self._number}")
            return super().start()

        def _wait(self, report: LaneReport) -> None:
            log.append(f"-{self._number}")

    drive(lanes_of((2, 1, 1), Logged), [request(policy="never", max_tokens=4)])
    # Four tokens, and one step in vain: nobody knew that the text would end.
    assert log == ["+0", "+0", "-0", "+0", "-0", "+0", "-0", "+0", "-0", "-0"]
    log.clear()
    pair = [request(policy="never", max_tokens=6), request("b", policy="always", experts=(1,), max_tokens=3)]
    drive(lanes_of((1, 1, 1), Logged), pair)
    in_flight: Counter[str] = Counter()
    together = 0
    for entry in log:
        in_flight[entry[1:]] += 1 if entry[0] == "+" else -1
        together += in_flight["0"] > 0 and in_flight["1"] > 0
    assert together > 0


def jobs(count: int, deferral: float, tokens: int) -> list[Job]:
    return [Job(f"{number}", [1, number + 1], tokens, deferral, number) for number in range(count)]


@pytest.mark.parametrize(
    ("concurrency", "deferral", "before", "after", "gain"),
    [(1, 0.0, 0.60, 0.98, 1.6), (1, 0.3, 0.75, 0.98, 1.2), (32, 0.0, 0.55, 0.93, 1.8), (32, 0.3, 0.65, 0.93, 1.3)],
)
def test_the_device_is_kept_busy(concurrency: int, deferral: float, before: float, after: float, gain: float) -> None:
    """At reckoned costs; for 256 rows, where the host is what limits the base, see the next test."""
    waited, _, ahead = (
        simulate(RECKONED, jobs(concurrency, deferral, 100), concurrency, each) for each in DEPTHS.values()
    )
    assert waited.busy < before
    assert ahead.busy > after
    assert ahead.tokens_per_second > gain * waited.tokens_per_second


def test_with_many_rows_the_host_limits() -> None:
    """What the device lacks at 256 rows is no order of launches: with half of the host's time it is busy."""
    whole, half = (
        simulate(with_host(RECKONED, share, share), jobs(256, 0.3, 32), 256, DEPTHS["base looks ahead too"])
        for share in (1.0, 0.5)
    )
    assert whole.busy > 0.5
    assert half.busy > 0.9
    assert half.tokens_per_second > 1.3 * whole.tokens_per_second

"""The step loop, in lockstep and overlapped, with lanes that answer at once and lanes that answer when they like."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import pytest

from bench.standin import StandinLane, next_token
from engine.lanes import LaneReport, LaneWork
from engine.lanes.shelf import Shelf
from engine.loop import StepLoop
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.strategies.deferral.pacing import Pacer
from engine.types import Collaboration, Delta, GenerationRequest, PolicyName, SamplingSpec
from tests.engine.builders import make_lanes, make_scheduler, mixed_requests, request
from tests.engine.oracle import Ledger, Pair, check

WAIT_SECONDS = 60.0
"""Longer than any step takes, however loaded the machine."""
PAIR = Pair(experts=2)
Coordination = Literal["lockstep", "overlapped"]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(PAIR.lanes) as pool:
        yield pool


class ThreadedLane(StandinLane):
    """Steps in another thread, and takes as long as it pleases."""

    pool: ThreadPoolExecutor
    dice = random.Random(0)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stepping = threading.Lock()

    def apply(self, work: LaneWork) -> None:
        assert not self._stepping.locked(), "told something while a step is under way"
        super().apply(work)

    def start(self) -> Future[LaneReport]:
        assert self._stepping.acquire(blocking=False), "two steps at once"
        return self.pool.submit(self._step, self.dice.choice((0.0, 0.0, 0.001, 0.003)))

    def _step(self, pause: float) -> LaneReport:
        time.sleep(pause)
        report = super().start().result()
        self._stepping.release()
        return report


class Drive:
    """A loop with its lanes, driven as the engine process drives it: waits only when a pass found nothing to do."""

    def __init__(self, lanes: list[Any], coordination: Coordination, scheduler: Scheduler | None = None) -> None:
        self.scheduler = scheduler or make_scheduler(PAIR)
        self.lanes = lanes
        self.ledger = Ledger()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.loop = StepLoop(self.scheduler, lanes, coordination, wake=lambda: self._wakes.put(None))

    def pass_once(self) -> bool:
        active = self.loop.step()
        self.ledger.take(self.scheduler.take_deltas())
        return active

    def run(self, requests: list[GenerationRequest]) -> None:
        for one in requests:
            self.scheduler.add(one)
        while self.pass_once() or self.loop.patience() is not None or not self.scheduler.idle:
            if self.loop.patience() is not None:
                self._wakes.get(timeout=WAIT_SECONDS)


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
@pytest.mark.parametrize("options", [{}, {"token_budget": 7, "kv_tokens": 80}])
def test_lanes_that_answer_at_once(coordination: Coordination, options: dict[str, int]) -> None:
    drive = Drive(make_lanes(PAIR, **options), coordination)
    requests = mixed_requests(40, PAIR)
    drive.run(requests)
    for one in requests:
        check(drive.ledger.got[one.request_id], one, PAIR)
    assert drive.loop.stats().integrity_errors == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threaded", [(0, 1, 2), (1, 2), (2,)])
def test_lanes_that_answer_in_any_order(threaded: tuple[int, ...], seed: int, pool: ThreadPoolExecutor) -> None:
    ThreadedLane.pool = pool
    ThreadedLane.dice = random.Random(seed)
    options: dict[str, Any] = {"token_budget": 16, "kv_tokens": 90, "shelf": Shelf()}
    slow, quick = (make_lanes(PAIR, kind, **options) for kind in (ThreadedLane, StandinLane))
    drive = Drive([(slow if number in threaded else quick)[number] for number in range(3)], "overlapped")
    requests = mixed_requests(25, PAIR, seed)
    drive.run(requests)
    for one in requests:
        check(drive.ledger.got[one.request_id], one, PAIR)
    stats = drive.loop.stats()
    assert (stats.running, stats.waiting, stats.integrity_errors) == (0, 0, 0)
    assert [lane.requests for lane in stats.lanes] == [0, 0, 0]


def test_aborts_while_steps_are_under_way(pool: ThreadPoolExecutor) -> None:
    ThreadedLane.pool = pool
    drive = Drive(make_lanes(PAIR, ThreadedLane), "overlapped")
    requests = mixed_requests(30, PAIR, seed=5)
    for one in requests:
        drive.scheduler.add(one)
    for number in range(0, 30, 2):
        drive.pass_once()
        drive.scheduler.abort(str(number))
    drive.run([])
    for one in requests:
        check(drive.ledger.got[one.request_id], one, PAIR)
    assert drive.loop.stats().integrity_errors == 0


class FailingLane(StandinLane):
    def start(self) -> Future[LaneReport]:
        future: Future[LaneReport] = Future()
        future.set_exception(RuntimeError("out of memory"))
        return future


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_fails_is_raised(coordination: Coordination, failing: int) -> None:
    lanes = make_lanes(PAIR)
    lanes[failing] = make_lanes(PAIR, FailingLane)[failing]
    drive = Drive(lanes, coordination)
    with pytest.raises(RuntimeError, match="out of memory"):
        drive.run([request(policy="always")])


class LateLane(StandinLane):
    """Its step completes when the test says so."""

    def start(self) -> Future[LaneReport]:
        self.future: Future[LaneReport] = Future()
        return self.future


def test_a_step_that_fails_later_is_raised() -> None:
    drive = Drive(make_lanes(PAIR, LateLane), "overlapped")
    drive.scheduler.add(request())
    assert drive.loop.step()
    assert not drive.loop.step()
    assert drive.loop.patience() is not None
    drive.lanes[0].future.set_exception(RuntimeError("a worker died"))
    with pytest.raises(RuntimeError, match="a worker died"):
        drive.loop.step()


def test_other_lanes_step_while_one_is_under_way() -> None:
    lanes: list[Any] = make_lanes(PAIR)
    lanes[1] = make_lanes(PAIR, LateLane)[1]
    drive = Drive(lanes, "overlapped")
    other = request("other", policy="never")
    drive.scheduler.add(request("parked", member=1))
    drive.scheduler.add(other)
    while drive.pass_once():
        pass
    check(drive.ledger.got["other"], other, PAIR)
    assert not drive.ledger.finished("parked")
    assert drive.loop.patience() is not None


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_with_nothing_to_do_nothing_is_done(coordination: Coordination) -> None:
    drive = Drive(make_lanes(PAIR), coordination)
    assert not drive.loop.step()
    stats = drive.loop.stats()
    assert [lane.steps for lane in stats.lanes] == [0, 0, 0]
    assert (stats.loop_seconds, stats.step_seconds) == (0.0, 0.0)


def test_the_account() -> None:
    drive = Drive(make_lanes(PAIR), "lockstep")
    drive.run([request(policy="always", experts=(1,)), request("b", member=2)])
    stats = drive.loop.stats()
    assert [lane.steps for lane in stats.lanes] == [4, 4, 4]
    assert [len(lane.step_seconds) for lane in stats.lanes] == [4, 4, 4]
    assert [lane.computed_tokens for lane in stats.lanes] == [6, 6, 6]
    assert len(stats.expert_waits) == 4
    assert 0 < stats.step_seconds <= stats.loop_seconds
    again = drive.loop.stats()
    assert again.expert_waits == []
    assert [lane.step_seconds for lane in again.lanes] == [[], [], []]


# -- integrity ------------------------------------------------------------------------------------------------


class KeepsRemoved(StandinLane):
    def apply(self, work: LaneWork) -> None:
        super().apply(LaneWork(add=work.add, extend=work.extend))


def test_what_an_idle_lane_still_holds_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    lanes = make_lanes(PAIR)
    lanes[1] = make_lanes(PAIR, KeepsRemoved)[1]
    drive = Drive(lanes, "lockstep")
    drive.run([request(policy="always", experts=(1,))])
    drive.run([])
    assert drive.loop.stats().integrity_errors == 1
    assert "idle lane lane-1 still holds request a" in caplog.text
    drive.run([request("b", policy="never")])
    assert drive.loop.stats().integrity_errors == 2, "it is looked at whenever the engine goes idle"


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_an_abort_leaves_nothing(coordination: Coordination) -> None:
    drive = Drive(make_lanes(PAIR), coordination)
    for number in range(4):
        drive.scheduler.add(request(str(number), policy="always", max_tokens=50))
    for number in range(4):
        drive.pass_once()
        drive.scheduler.abort(str(number))
    drive.run([])
    assert drive.scheduler.idle
    assert drive.loop.stats().integrity_errors == 0
    assert [lane.leftovers() for lane in drive.lanes] == [[], [], []]


def test_shutdown_frees_the_lanes() -> None:
    drive = Drive(make_lanes(PAIR), "lockstep")
    drive.scheduler.add(request())
    drive.pass_once()
    drive.loop.shutdown()
    assert [lane.leftovers() for lane in drive.lanes] == [[], [], []]


# -- a lane that does not come back ---------------------------------------------------------------------------


class _Hanging(StandinLane):
    """Computes, but hands the report out only when released."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.held: list[tuple[Future[LaneReport], LaneReport]] = []
        self.hangs = False

    def start(self) -> Future[LaneReport]:
        done = super().start()
        if not self.hangs:
            return done
        future: Future[LaneReport] = Future()
        self.held.append((future, done.result()))
        return future

    def release(self) -> None:
        self.hangs = False
        for future, report in self.held:
            future.set_result(report)
        self.held.clear()


@pytest.mark.parametrize("expert_failure", ["error", "base"])
@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_an_expert_that_hangs(expert_failure: Any, coordination: Any) -> None:
    """Those who wait for it end or go on without it, others are not touched, and it serves again when it is back."""
    base, expert = StandinLane(0, "base", experts=1), _Hanging(1, "expert")
    scheduler = Scheduler(
        lanes=2,
        max_num_seqs=8,
        max_model_len=1024,
        eos_token_ids=[],
        strategy=Strategies(2, has_gate=True, expert_failure=expert_failure),
    )
    loop = StepLoop(scheduler, [base, expert], coordination, step_timeout=0.02)
    prompts = {"deferring": [1, 2, 3], "base": [4, 5, 6]}
    expert.hangs = True
    scheduler.add(
        GenerationRequest("deferring", prompts["deferring"], SamplingSpec(max_tokens=6), Collaboration(policy="always"))
    )
    scheduler.add(GenerationRequest("base", prompts["base"], SamplingSpec(max_tokens=6), Collaboration(policy="never")))
    found = _drain(scheduler, loop)
    assert found["base"].finish_reason == "length"
    assert found["base"].sources == [0] * 6
    hung = found["deferring"]
    if expert_failure == "error":
        assert hung.finish_reason == "error"
        assert hung.error is not None
        assert "timed out" in hung.error
    else:
        assert (hung.finish_reason, hung.sources) == ("length", [0] * 6)
        assert hung.tokens == _alone(0, prompts["deferring"], 6)
    assert not loop.stats().lanes[1].up
    assert loop.stats().expert_failures >= 1
    # A member that is lost fails at once.
    scheduler.add(GenerationRequest("member", [7], SamplingSpec(max_tokens=3), Collaboration(member=1)))
    assert _drain(scheduler, loop)["member"].finish_reason == "error"

    expert.release()
    scheduler.add(
        GenerationRequest("after", prompts["deferring"], SamplingSpec(max_tokens=6), Collaboration(policy="always"))
    )
    assert _drain(scheduler, loop)["after"].tokens == _alone(1, prompts["deferring"], 6)
    while loop.step():
        pass
    assert loop.stats().lanes[1].up
    assert base.leftovers() == expert.leftovers() == []
    assert loop.stats().integrity_errors == 0


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_an_expert_that_hangs_and_then_fails(coordination: Any, caplog: pytest.LogCaptureFixture) -> None:
    base, expert = StandinLane(0, "base", experts=1), _Hanging(1, "expert")
    scheduler = Scheduler(
        lanes=2, max_num_seqs=8, max_model_len=1024, eos_token_ids=[], strategy=Strategies(2, has_gate=True)
    )
    loop = StepLoop(scheduler, [base, expert], coordination, step_timeout=0.02)
    expert.hangs = True
    scheduler.add(GenerationRequest("a", [1], SamplingSpec(max_tokens=6), Collaboration(policy="always")))
    assert _drain(scheduler, loop)["a"].finish_reason == "error"
    ((future, _),) = expert.held
    future.set_exception(RuntimeError("its device fell off"))
    with pytest.raises(RuntimeError, match="fell off"):
        loop.step()
    assert "is back" not in caplog.text


def test_an_overdue_step_says_nothing_of_what_steps_cost() -> None:
    base, expert = StandinLane(0, "base", experts=1), _Hanging(1, "expert")
    scheduler = Scheduler(
        lanes=2, max_num_seqs=8, max_model_len=1024, eos_token_ids=[], strategy=Strategies(2, has_gate=True)
    )
    pacer = Pacer(2)
    loop = StepLoop(scheduler, [base, expert], "lockstep", pacer, step_timeout=0.02)
    expert.hangs = True
    scheduler.add(GenerationRequest("a", [1], SamplingSpec(max_tokens=6), Collaboration(policy="always")))
    _drain(scheduler, loop)
    expert.release()
    while loop.step():
        pass
    assert loop.stats().lanes[1].up
    assert not pacer._costs[1].known


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_a_base_that_hangs_ends_the_engine(coordination: Any) -> None:
    base = _Hanging(0, "base")
    base.hangs = True
    scheduler = Scheduler(
        lanes=1,
        max_num_seqs=8,
        max_model_len=1024,
        eos_token_ids=[],
        strategy=Strategies(1, has_gate=False, policy="never"),
    )
    loop = StepLoop(scheduler, [base], coordination, step_timeout=0.02)
    scheduler.add(GenerationRequest("a", [1]))
    with pytest.raises(TimeoutError, match="base timed out"):
        _drain(scheduler, loop)


# -- a lane whose memory does not suffice ---------------------------------------------------------------------


class _Starved(_Hanging):
    """Says that the request with this order waits for memory; in its place, nothing is ever computed."""

    order: int | None = None
    rooms = 0

    def has_work(self) -> bool:
        return self.order is None and super().has_work()

    @property
    def starved(self) -> int | None:
        return self.order

    def make_room(self) -> None:
        self.rooms += 1


def _starved(coordination: Any, orders: list[int | None]) -> tuple[StepLoop, list[_Starved]]:
    """A loop with two requests, one of which has rows in both lanes."""
    lanes = [_Starved(number, f"lane-{number}", experts=1 - number) for number in range(2)]
    scheduler = Scheduler(
        lanes=2, max_num_seqs=8, max_model_len=1024, eos_token_ids=[], strategy=Strategies(2, has_gate=True)
    )
    policies: dict[str, PolicyName] = {"deferring": "always", "base": "never"}
    for name, policy in policies.items():
        collaboration = Collaboration(policy=policy)
        scheduler.add(GenerationRequest(name, [1], SamplingSpec(max_tokens=60), collaboration))
    loop = StepLoop(scheduler, lanes, coordination, step_timeout=WAIT_SECONDS)
    lanes[1].order = orders[1]
    for _ in range(3):
        loop.step()
    for lane, order in zip(lanes, orders, strict=True):
        lane.order = order
    return loop, lanes


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
@pytest.mark.parametrize(("orders", "rooms"), [([5, 3], [0, 1]), ([3, 5], [1, 0]), ([2, 2], [1, 0])])
def test_memory_goes_to_who_was_admitted_first(
    coordination: Coordination, orders: list[int | None], rooms: list[int]
) -> None:
    loop, lanes = _starved(coordination, orders)
    assert loop.step()
    assert [lane.rooms for lane in lanes] == rooms


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_no_memory_is_taken_while_any_lane_goes_on(coordination: Coordination) -> None:
    loop, lanes = _starved(coordination, [3, 5])
    lanes[1].order = None
    loop.step()
    assert lanes[0].rooms == 0, "the expert has stepped"
    loop.step()
    assert lanes[0].rooms == 1


def test_memory_is_taken_beside_a_lane_that_is_lost() -> None:
    loop, lanes = _starved("overlapped", [None, None])
    lanes[1].hangs = True
    while not lanes[1].held:
        loop.step()
    lanes[0].order = 3
    loop.step()
    assert lanes[0].rooms == 0, "its step is under way and may free what is wanted"
    loop._deadlines[1] = 0.0  # it is overdue, however quick this test is
    while not lanes[0].rooms:
        assert loop.step()
    assert not loop.stats().lanes[1].up


def _alone(lane: int, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(lane, tokens, 256))
    return tokens[len(prompt) :]


def _drain(scheduler: Scheduler, loop: StepLoop) -> dict[str, Delta]:
    """Step until every request has ended; a step that is overdue may take its patience."""
    found: dict[str, Delta] = {}
    deadline = time.monotonic() + 60.0
    while scheduler.running or scheduler.waiting or not found:
        assert time.monotonic() < deadline
        if not loop.step() and (patience := loop.patience()) is not None:
            time.sleep(patience)
        for delta in scheduler.take_deltas():
            if delta.request_id in found:
                earlier = found[delta.request_id]
                delta = Delta(
                    delta.request_id,
                    earlier.tokens + delta.tokens,
                    earlier.sources + delta.sources,
                    finish_reason=delta.finish_reason,
                    error=delta.error,
                )
            found[delta.request_id] = delta
    return found

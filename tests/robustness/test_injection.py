"""Failure injection below HTTP: lanes that raise, stall, lie or answer nonsense.

The request or the engine fails, and says so; what was asked of other requests is answered right; no wrong answer is
ever given silently.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from msgspec.structs import replace

from bench.standin import StandinLane
from engine.lanes.interface import LaneReport, Sample
from engine.loop import StepLoop
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.types import Collaboration, Delta, GenerationRequest, SamplingSpec

NAN, INFINITY = float("nan"), float("inf")
Change = Callable[[list[Sample]], list[Sample]]


class FaultyLane(StandinLane):
    """A stand-in whose report is changed, from its ``after``-th step on, for ``times`` steps."""

    def __init__(self, number: int, name: str, *, after: int = 3, times: int = 1, **options: Any) -> None:
        super().__init__(number, name, **options)
        self.change: Change | None = None
        self._left = times
        self._after = after

    def start(self) -> Future[LaneReport]:
        future = super().start()
        self._after -= 1
        if self.change is None or self._after >= 0 or not self._left:
            return future
        report = future.result()
        if not report.samples:
            return future
        self._left -= 1
        changed: Future[LaneReport] = Future()
        try:
            changed.set_result(LaneReport(self.change(report.samples), report.seconds))
        except Exception as error:
            changed.set_exception(error)
        return changed


class House:
    """Two lanes and their scheduler, driven until nothing is left to do."""

    def __init__(
        self,
        faulty: int,
        coordination: Any = "lockstep",
        expert_failure: Any = "error",
        step_timeout: float = 60.0,
        **options: Any,
    ) -> None:
        self.lanes: list[Any] = [
            (FaultyLane if number == faulty else StandinLane)(
                number, name, experts=1 - number, **(options if number == faulty else {})
            )
            for number, name in enumerate(("base", "codes"))
        ]
        self.scheduler = Scheduler(
            lanes=2,
            max_num_seqs=8,
            max_model_len=1024,
            vocab_size=256,
            eos_token_ids=[0],
            strategy=Strategies(2, has_gate=True, expert_failure=expert_failure),
        )
        self.wakened = threading.Event()
        self.loop = StepLoop(self.scheduler, self.lanes, coordination, step_timeout=step_timeout, wake=self.wakened.set)
        self.got: dict[str, Delta] = {}

    def take(self) -> None:
        for delta in self.scheduler.take_deltas():
            whole = self.got.setdefault(delta.request_id, Delta(delta.request_id))
            assert whole.finish_reason is None, "something came after the end"
            assert len(delta.tokens) == len(delta.sources) == len(delta.deferrals)
            whole.tokens += delta.tokens
            whole.sources += delta.sources
            whole.deferrals += delta.deferrals
            whole.finish_reason, whole.error = delta.finish_reason, delta.error

    def run(self, most: int = 2000) -> dict[str, Delta]:
        for _ in range(most):
            active = self.loop.step()
            self.take()
            if not active:
                return self.got
        raise AssertionError("the engine never came to rest")


def requests(**fields: Any) -> Iterator[GenerationRequest]:
    collaboration = Collaboration(**{"policy": "random", "rate": 0.5, **fields})
    for number in range(6):
        sampling = SamplingSpec(max_tokens=30, ignore_eos=True, seed=number)
        yield GenerationRequest(f"r{number}", [number + 1, 2, 3], sampling, collaboration)


def answers(house: House, **fields: Any) -> dict[str, Delta]:
    for request in requests(**fields):
        house.scheduler.add(request)
    return house.run()


def truth(**fields: Any) -> dict[str, Delta]:
    return answers(House(faulty=2), **fields)


def _only_first(**changes: Any) -> Change:
    return lambda samples: [replace(samples[0], **changes), *samples[1:]]


# -- the gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("policy", ["threshold", "sample"])
def test_gate_that_is_not_finite(policy: Any, value: float) -> None:
    """That one request ends with an error, and is counted; the others' answers are what they would have been."""
    house = House(faulty=0)
    house.lanes[0].change = _only_first(gate=[value])
    expected = truth(policy=policy)
    got = answers(house, policy=policy)
    failed = [name for name, whole in got.items() if whole.finish_reason == "error"]
    assert len(failed) == house.scheduler.counters.gate_errors == 1
    assert got[failed[0]].error == "the gate's value is not finite"
    # What it had written before was right.
    assert expected[failed[0]].tokens[: len(got[failed[0]].tokens)] == got[failed[0]].tokens
    for name in got.keys() - set(failed):
        assert got[name] == expected[name]
    assert house.loop.stats().integrity_errors == 0


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("policy", ["random", "always", "never", "confidence"])
def test_gate_that_is_not_finite_and_not_needed(policy: Any, value: float) -> None:
    """Policies that don't ask the gate write what they would have; only its probability is missing."""
    house = House(faulty=0, times=1000)
    house.lanes[0].change = lambda samples: [replace(sample, gate=[value]) for sample in samples]
    expected = truth(policy=policy)
    got = answers(house, policy=policy)
    assert house.scheduler.counters.gate_errors == 0
    for name, whole in got.items():
        assert (whole.tokens, whole.sources) == (expected[name].tokens, expected[name].sources)
        assert whole.finish_reason == "length"
        asked = [deferral is not None for deferral in whole.deferrals]
        assert all(asked) if policy == "confidence" else not any(asked[4:])


@pytest.mark.parametrize("value", [NAN, INFINITY, -0.5, 1.5])
def test_top_probability_that_is_none(value: float) -> None:
    house = House(faulty=0)
    house.lanes[0].change = _only_first(top_probability=value)
    got = answers(house, policy="confidence")
    assert sorted(whole.finish_reason for whole in got.values()) == ["error", *["length"] * 5]
    assert house.scheduler.counters.gate_errors == 1


# -- lanes that raise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_a_lane_that_raises(lane: int, coordination: Any) -> None:
    """The loop cannot go on, and says so; nothing that was taken before is wrong."""
    house = House(faulty=lane, coordination=coordination)

    def explode(_: list[Sample]) -> list[Sample]:
        raise RuntimeError("injected")

    house.lanes[lane].change = explode
    with pytest.raises(RuntimeError, match="injected"):
        answers(house)
    expected = truth()
    for name, whole in house.got.items():
        assert whole.finish_reason is None
        assert whole.tokens == expected[name].tokens[: len(whole.tokens)]


# -- lanes that report too much, too little, or something else ------------------------------------------------

REPORTS: dict[str, Change] = {
    "a sample twice": lambda samples: [*samples, *samples],
    "another request's id": lambda samples: [replace(samples[0], request_id="nobody", token=1), *samples],
    "an old position": lambda samples: [replace(samples[0], position=samples[0].position - 1, token=1), *samples],
    "a later position": lambda samples: [replace(samples[0], position=samples[0].position + 1, token=1), *samples],
    "another order": lambda samples: samples[::-1],
}


@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("what", REPORTS)
def test_reports_that_are_harmless(lane: int, what: str) -> None:
    """What comes twice, for nobody, or for another position is ignored: the answers are right."""
    house = House(faulty=lane, times=1000)
    house.lanes[lane].change = REPORTS[what]
    assert answers(house) == truth()


def _run_or_raise(house: House, **fields: Any) -> dict[str, Delta] | None:
    try:
        return answers(house, **fields)
    except Exception:
        return None


@pytest.mark.parametrize("lane", [0, 1])
def test_a_row_too_few(lane: int) -> None:
    """A sample that is missing: the request must not wait forever without anybody noticing."""
    house = House(faulty=lane)
    house.lanes[lane].change = lambda samples: samples[1:]
    got = _run_or_raise(house)
    if got is not None:
        assert house.scheduler.running == 0, "a request is left that nothing will ever end"
        expected = truth()
        for name, whole in got.items():
            assert whole.finish_reason == "error" or whole == expected[name]


@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("token", [256, 1 << 31])
def test_a_token_outside_the_vocabulary(lane: int, token: int) -> None:
    """Never a silent wrong answer: an error of the request or of the engine."""
    house = House(faulty=lane)
    house.lanes[lane].change = _only_first(token=token)
    got = _run_or_raise(house)
    if got is not None:
        written = [one for whole in got.values() for one in whole.tokens]
        assert all(0 <= one < 256 for one in written)


@pytest.mark.parametrize("gate", [[], None])
def test_gate_values_that_are_missing(gate: list[float] | None) -> None:
    """A gate with fewer values than experts: an error; a lane that suddenly has no gate: no silent decision."""
    house = House(faulty=0)
    house.lanes[0].change = _only_first(gate=gate)
    got = _run_or_raise(house, policy="threshold")
    if got is not None:
        assert any(whole.finish_reason == "error" for whole in got.values())


# -- lanes that stall -----------------------------------------------------------------------------------------


class StallingLane(StandinLane):
    """Overlapped: its third step never completes by itself."""

    stalled: Future[LaneReport] | None = None
    steps = 0

    def start(self) -> Future[LaneReport]:
        self.steps += 1
        if self.steps == 3:
            self.stalled = Future()
            self.report = super().start().result()
            return self.stalled
        return super().start()


def test_a_lane_that_stalls_and_goes_on() -> None:
    """Overlapped: those that don't need the lane go on; when the step completes, the others' answers are right."""
    house = House(faulty=2, coordination="overlapped")
    lane = StallingLane(1, "codes")
    house.lanes[1] = lane
    for request in requests():
        house.scheduler.add(request)
    for number in range(4):
        alone = Collaboration(member=0)
        sampling = SamplingSpec(max_tokens=30, ignore_eos=True, seed=number)
        house.scheduler.add(GenerationRequest(f"alone{number}", [number + 1], sampling, alone))
    for _ in range(500):
        house.loop.step()
        house.take()
    assert all(house.got[f"alone{number}"].finish_reason == "length" for number in range(2))
    assert lane.stalled is not None
    assert house.scheduler.running > 0
    assert house.loop.patience() is not None
    lane.stalled.set_result(lane.report)
    assert house.wakened.is_set()
    got = house.run()
    expected = truth()
    assert {name: got[name] for name in expected} == expected


@pytest.mark.parametrize("expert_failure", ["error", "base"])
def test_a_lane_that_stalls_for_good(expert_failure: str) -> None:
    """After the step timeout: requests that wait for the expert end with an error, or the base writes on alone."""
    house = House(faulty=2, coordination="overlapped", expert_failure=expert_failure, step_timeout=0.05)
    house.lanes[1] = StallingLane(1, "codes")
    for request in requests():
        house.scheduler.add(request)
    for _ in range(200):
        house.loop.step()
        house.take()
        time.sleep(0.001)
    assert house.scheduler.running == house.scheduler.waiting == 0
    expected = "error" if expert_failure == "error" else "length"
    assert {whole.finish_reason for whole in house.got.values()} == {expected}
    assert house.scheduler.counters.expert_failures >= 6
    for whole in house.got.values():
        if expert_failure == "error":
            assert whole.error is not None
            assert "timed out" in whole.error
        else:
            assert len(whole.tokens) == 30


# -- the client's side ----------------------------------------------------------------------------------------


GARBAGE = [b"\xc1garbage", b"\x82\xa4type\xa8Shutdown\xa1x" + b"\x91" * 100_000 + b"\x90"]
"""No MessagePack, and a message whose unknown field is nested deeper than the decoder goes."""


@pytest.mark.parametrize("garbage", GARBAGE, ids=["garbage", "nested"])
async def test_garbage_to_the_engine_is_dropped(garbage: bytes) -> None:
    """The engine says so in its log, and goes on serving."""
    from engine.client import EngineClient
    from tests.engine.builders import request, standin_config
    from tests.engine.oracle import Pair

    client = await asyncio.wait_for(EngineClient.start(standin_config(Pair(max_model_len=900, experts=1))), 60)
    try:
        await client._requests.send(garbage)
        async with asyncio.timeout(60):
            deltas = [delta async for delta in client.generate(request("after", max_tokens=20))]
        assert deltas[-1].finish_reason == "length"
    finally:
        await client.shutdown()


@pytest.mark.parametrize("garbage", GARBAGE, ids=["garbage", "nested"])
async def test_garbage_on_the_wire_is_noticed(garbage: bytes) -> None:
    """An engine that sends what is no message: the client does not take it for an answer, and does not hang."""
    from engine.client import EngineClient
    from tests.engine.builders import request, standin_config
    from tests.engine.oracle import Pair

    client = await asyncio.wait_for(EngineClient.start(standin_config(Pair(max_model_len=900, experts=1))), 60)
    try:
        import zmq.asyncio

        socket = zmq.asyncio.Context.instance().socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{client._directory / 'batches'}")
        await socket.send(garbage)
        await asyncio.sleep(0.2)
        socket.close()

        async def outcome() -> str:
            try:
                async for delta in client.generate(request("after", max_tokens=20)):
                    last = delta
                return str(last.finish_reason)
            except Exception as error:
                return type(error).__name__

        assert await asyncio.wait_for(outcome(), 10) in ("EngineDeadError", "length")
    finally:
        await client.shutdown()

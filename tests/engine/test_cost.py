"""What requests are charged: all that the lanes did, nothing twice, nothing to the wrong one."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from bench.standin import StandinLane
from engine.lanes import LaneReport
from engine.loop import StepLoop
from engine.types import Cost
from tests.engine.builders import make_lanes, make_scheduler, mixed_requests, request
from tests.engine.oracle import Pair

PAIR = Pair(experts=2)


class Timed(StandinLane):
    """A lane whose steps take a second for each row, that notes their sum."""

    spent = 0.0

    def start(self) -> Future[LaneReport]:
        future = super().start()
        report = future.result()
        report.seconds = float(report.rows)
        self.spent += report.seconds
        return future


class Costs:
    """A loop of stand-ins, and what each request had cost with its last delta."""

    def __init__(self, pair: Pair, **lanes: int) -> None:
        self.now = 0.0
        self.scheduler = make_scheduler(pair, clock=lambda: self.now)
        self.lanes = make_lanes(pair, Timed, **lanes)
        self.loop = StepLoop(self.scheduler, self.lanes, "lockstep")
        self.of: dict[str, Cost] = {}

    def step(self) -> None:
        self.loop.step()
        for delta in self.scheduler.take_deltas():
            assert delta.cost is not None
            self.of[delta.request_id] = delta.cost

    def run(self) -> None:
        while not self.scheduler.idle:
            self.step()


def test_what_lanes_computed_is_charged_to_the_last_position() -> None:
    costs = Costs(PAIR, token_budget=16, kv_tokens=4 * PAIR.max_model_len)
    for one in mixed_requests(60, PAIR, seed=5):
        costs.scheduler.add(one)
    costs.run()
    for number, lane in enumerate(costs.lanes):
        assert isinstance(lane, Timed)
        charged = sum(cost.seconds[number] for cost in costs.of.values())
        # What was computed for a request after its last token (drafts, a step that came too late) is nobody's.
        assert 0.8 * lane.spent < charged <= lane.spent * (1 + 1e-9)
        prompts = sum(cost.prompt_tokens[number] for cost in costs.of.values())
        assert 0.9 * lane.stats().prompt_tokens <= prompts <= lane.stats().prompt_tokens > 0


def test_one_token_of_an_expert_costs_it_the_whole_prompt() -> None:
    costs = Costs(PAIR)
    costs.scheduler.add(request(prompt=range(1, 41), policy="always", experts=(2,), max_tokens=1, run_ahead="off"))
    costs.run()
    assert costs.of["a"].prompt_tokens == [40, 0, 40]
    assert costs.of["a"].seconds == [1.0, 0.0, 1.0]


def test_a_scored_text_is_a_prompt_to_all_who_read_it() -> None:
    costs = Costs(PAIR)
    text = range(1, 41)
    costs.scheduler.add(request(prompt=text, scores=True, prompt_logprobs=0, policy="always", experts=(2,)))
    costs.run()
    assert costs.of["a"].prompt_tokens == [40, 0, 40]
    assert [lane.stats().catchup_tokens for lane in costs.lanes] == [0, 0, 0]


def test_a_step_s_time_is_divided_by_positions() -> None:
    costs = Costs(PAIR)
    for name, length in (("long", 30), ("short", 10)):
        costs.scheduler.add(request(name, range(1, length + 1), member=1, max_tokens=1))
    costs.run()
    assert costs.of["long"].seconds[1] == pytest.approx(1.5)
    assert costs.of["short"].seconds[1] == pytest.approx(0.5)


def test_time_in_the_queue_ends_with_admission() -> None:
    costs = Costs(Pair(experts=1, max_num_seqs=1))
    costs.scheduler.add(request("first", policy="never", max_tokens=2))
    costs.scheduler.add(request("second", policy="never", max_tokens=1))
    while "first" not in costs.of or costs.scheduler.waiting:
        costs.now += 1.0
        costs.step()
    queued = costs.now - 1.0
    costs.now += 10.0
    costs.run()
    assert queued > 0
    assert costs.of["first"].queue_seconds == 1.0
    assert costs.of["second"].queue_seconds == queued + 1.0

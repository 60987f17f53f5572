"""The cost model against sums that can be done by hand, and on one small pair with real engines."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest

from bench.account import Account
from bench.cost_model import PairCost, Predicted, StepTime, Stretch, fit, predict
from bench.shapes import Pair
from bench.workload import Deferral, Job
from engine.config import SchedulerConfig
from tests.packaging.sources import ROOT

LOCKSTEP = SchedulerConfig(coordination="lockstep", gather="off", run_ahead="off")
NEARLY_NOTHING = StepTime(1e-9, 0.0, 0.0)
BY_THE_STEP = PairCost((StepTime(1.0, 0.0, 0.0), StepTime(4.0, 0.0, 0.0)), 0.0, 0.0)


def test_fit_finds_what_costs_were_made_of() -> None:
    counts = [(10.0, 10.0, 10.0), (10.0, 320.0, 320.0), (5.0, 900.0, 20.0), (7.0, 30.0, 9.0)]
    costs = (0.5, 0.01, 0.002)
    stretches = [Stretch(each, sum(a * b for a, b in zip(each, costs, strict=True))) for each in counts]
    assert fit(stretches) == pytest.approx(costs)


def test_fit_is_never_negative() -> None:
    # What is only explained by a negative price of the second thing.
    found = fit([Stretch((1.0, 1.0), 3.0), Stretch((1.0, 2.0), 2.0), Stretch((1.0, 3.0), 1.0)])
    assert found[1] == 0.0
    assert 1.0 < found[0] < 3.0


def test_costs_of_a_pair_from_its_accounts() -> None:
    def account(passes: int, rows: int) -> Account:
        lanes = [passes * (0.1 + 0.01 * rows), passes * (0.3 + 0.02 * rows)]
        own = passes * (0.05 + 0.001 * 2 * rows)
        return Account(
            loop_seconds=sum(lanes) + own,
            step_seconds=sum(lanes),
            steps=[passes, passes],
            rows=[passes * rows, passes * rows],
            computed=[passes * rows, passes * rows],
            lane_seconds=lanes,
        )

    cost = PairCost.of([account(100, 1), account(30, 8), account(10, 32)])
    for lane, (fixed, each) in zip(cost.lanes, ((0.1, 0.01), (0.3, 0.02)), strict=True):
        assert lane.seconds(0, 0) == pytest.approx(fixed)
        # A row and its one token always came together here.
        assert lane.token + lane.row == pytest.approx(each)
    assert (cost.pass_seconds, cost.row_seconds) == pytest.approx((0.05, 0.001))


def jobs(count: int, deferral: Deferral, tokens: int = 20) -> list[Job]:
    return [Job(f"{number}", [1, 2, 3, number + 1], tokens, deferral, number) for number in range(count)]


def run(count: int, deferral: Deferral, cost: PairCost = BY_THE_STEP, **options: Any) -> Predicted:
    return predict(cost, jobs(count, deferral), 8, options.pop("settings", LOCKSTEP), **options)


@pytest.mark.parametrize(
    ("deferral", "member", "seconds"),
    [(0.0, None, 20.0), (1.0, None, 20 * 5.0), (0.0, 1, 20 * 4.0), (1.0, 0, 20.0)],
    ids=["never", "always", "expert alone", "base alone"],
)
@pytest.mark.parametrize("count", [1, 8])
def test_steps_that_all_cost_the_same(deferral: float, member: int | None, seconds: float, count: int) -> None:
    predicted = run(count, deferral, member=member)
    assert predicted.seconds == pytest.approx(seconds)
    assert predicted.tokens == 20 * count
    assert predicted.tokens_per_second == pytest.approx(20 * count / seconds)


def test_the_next_job_comes_when_one_has_finished() -> None:
    assert run(24, 0.0).seconds == pytest.approx(3 * run(8, 0.0).seconds)


def test_own_time_of_passes_and_rows() -> None:
    cost = PairCost((NEARLY_NOTHING, NEARLY_NOTHING), 0.5, 0.25)
    assert run(8, 0.0, cost).seconds == pytest.approx(20 * (0.5 + 8 * 0.25))
    assert run(8, 1.0, cost).seconds == pytest.approx(20 * (0.5 + 16 * 0.25))


def test_catch_up_is_paid_for() -> None:
    """Whatever the rate, the expert computes every position up to its last word."""
    cost = PairCost((NEARLY_NOTHING, StepTime(0.0, 1.0, 0.0)), 0.0, 0.0)
    always = run(1, 1.0, cost).seconds
    assert always == pytest.approx(4 + 19)
    assert always - 6 < run(1, 0.5, cost).seconds <= always


def test_run_ahead_saves_steps_as_often_as_the_models_agree() -> None:
    ahead = SchedulerConfig(coordination="lockstep", gather="off", gather_max_wait_seconds=1e9, run_ahead=4)
    without = run(1, 1.0)
    twins = run(1, 1.0, settings=ahead, agreement=1.0)
    halves = run(1, 1.0, settings=ahead, agreement=0.5)
    strangers = run(1, 1.0, settings=ahead, agreement=0.0)
    assert without.steps[1] == strangers.steps[1] == 20
    assert twins.steps[1] == 4  # five tokens per visit
    assert twins.steps[1] < halves.steps[1] < strangers.steps[1]


def test_gather_shares_steps() -> None:
    gather = SchedulerConfig(coordination="lockstep", gather=6, gather_max_wait_seconds=1e9, run_ahead="off")
    assert run(8, 0.2, settings=gather).steps[1] < run(8, 0.2).steps[1]


FLAT = StepTime(1.95e-3, 0.0, 15e-6)
GPU = PairCost((FLAT, FLAT), 0.1e-3, 7e-6)
"""A model of 1 B parameters on an H100, as reckoned: a step takes 2 ms for one row and 2.4 for 32."""


def test_an_adapter_costs_no_second_step() -> None:
    assert run(8, 1.0, guest=True).seconds == pytest.approx(20 * 2)
    together, apart = run(8, 0.3, guest=True), run(8, 0.3)
    assert together.expert_tokens == apart.expert_tokens
    assert together.seconds < apart.seconds / 2


def test_what_an_adapter_is_worth_where_steps_are_flat() -> None:
    """32 requests, three of ten tokens deferred: against the base alone, and against two lanes."""
    settings = SchedulerConfig(coordination="lockstep")
    work = jobs(64, 0.3, 100)

    def speed(**options: Any) -> float:
        return predict(GPU, work, 32, settings, agreement=0.6, **options).tokens_per_second

    together = speed(guest=True)
    assert together / speed(member=0) >= 0.75
    assert together / speed() >= 1.2


class Roofline(StepTime):
    """Bound by memory in decoding, by arithmetic in long prompts; the first step starts the device."""

    first = True

    def seconds(self, tokens: float, rows: float) -> float:
        first, Roofline.first = Roofline.first, False
        return max(self.fixed, self.token * tokens) + self.row * rows + 2.0 * first


def test_pacing_on_costs_like_a_gpu() -> None:
    """Automatic windows and waits against the best fixed ones: flat decoding, steep prompts, one slow first step."""
    cost = PairCost((Roofline(1.2e-3, 2.3e-6, 4e-6), Roofline(8e-3, 18e-6, 26e-6)), 0.1e-3, 7e-6)
    dice = random.Random(1)
    work = [Job(f"{number}", [dice.randrange(1 << 20) for _ in range(200)], 64, 0.3, number) for number in range(96)]

    def speed(**settings: Any) -> float:
        Roofline.first = True
        options = SchedulerConfig(coordination="lockstep", **settings)
        predicted = predict(cost, work, 32, options, agreement=0.6)
        return predicted.tokens / (predicted.seconds - 2.0)

    fixed = [speed(gather=gather, run_ahead=4, gather_max_wait_seconds=10.0) for gather in (16, 24)]
    assert speed() > 0.93 * max(fixed)


@pytest.mark.slow  # the sums are shown above, and a command with real engines by test_command.py
def test_predict_command(tiny: Pair) -> None:
    size = ["--concurrency", "1", "4", "--rounds", "1", "--requests", "2", "--max-tokens", "16"]
    options = ["--shape", "tiny", "--device", "cpu", "--deferral", "0.5", *size]
    options += ["--workdir", str(tiny.base.path.parents[1])]
    result = subprocess.run(
        [sys.executable, "-m", "bench", "predict", *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout.splitlines()[-1])["reports"]
    assert {(cell["concurrency"], cell["way"]) for cell in report["cells"]} == {
        (concurrency, way) for concurrency in (1, 4) for way in ("lockstep", "automatic")
    }
    for cell in report["cells"]:
        # Forced deferrals: the number of the expert's steps follows from the jobs, not from what a step takes.
        if cell["way"] == "lockstep" and cell["concurrency"] == 1:
            assert cell["predicted_expert_steps"] == pytest.approx(cell["expert_steps"], rel=0.35)
        assert all(value > 0 for value in cell["predicted"])
    (cost,) = report["costs"]
    assert all(value >= 0 for lane in cost["lanes"] for value in lane.values())
    assert len(report["worth"]) == 4

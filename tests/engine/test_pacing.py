"""Pacing: costs are fitted, expert steps wait exactly while that gains tokens, and never too long."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from engine.loop import StepLoop
from engine.strategies.base import Outlook
from engine.strategies.deferral.pacing import Pacer, StepCost
from tests.engine.builders import make_lanes, make_scheduler, mixed_requests, request
from tests.engine.oracle import Ledger, Pair, check


def outlook(
    parked: int = 4, drafting: int = 0, progress: float = 28.0, fixed_window: int = 0, alone: int = 0
) -> Outlook:
    return Outlook(parked, drafting, fixed_window, 0.0, progress, alone)


def pacer(now: float = 0.0, **options: Any) -> Pacer:
    return Pacer(2, clock=lambda: now, **options)


def learn(it: Pacer, lane: int, fixed: float, each: float, rows: Iterable[int] = range(1, 33)) -> None:
    for count in rows:
        it.observe(lane, count, count, fixed + each * count)


# -- costs ----------------------------------------------------------------------------------------------------


def test_an_affine_cost_is_found() -> None:
    cost = StepCost()
    for tokens in range(1, 60):
        cost.observe(tokens, tokens, 0.010 + 0.001 * tokens)
    assert cost.slope == pytest.approx(0.001)
    assert cost.seconds(0) == pytest.approx(0.010)
    assert cost.seconds(100) == pytest.approx(0.110)


def test_a_cost_follows_the_machine() -> None:
    cost = StepCost()
    for factor in (1.0, 3.0):
        for tokens in list(range(1, 33)) * 20:
            cost.observe(tokens, tokens, factor * (0.010 + 0.001 * tokens))
    assert cost.seconds(16) == pytest.approx(3 * 0.026, rel=0.05)


def test_steps_that_do_not_differ_tell_no_slope() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(8, 8, 0.02)
    assert cost.slope == 0
    assert cost.seconds(3) == pytest.approx(0.02)


def test_noise_makes_no_negative_cost() -> None:
    dice = random.Random(3)
    for _ in range(200):
        cost = StepCost()
        for _ in range(10):
            cost.observe(dice.randrange(1, 40), 1, dice.random())
        assert cost.slope >= 0
        assert cost.seconds(0) >= 0


def gpu_step(tokens: int, rows: int) -> float:
    """Bound by reading 16 GB of weights up to some 400 tokens, then by arithmetic."""
    return max(8e-3, 18e-6 * tokens) + 5e-6 * rows


def test_prompts_do_not_make_decoding_dear() -> None:
    """One step in twenty reads prompts of 2,048 tokens; what a row more costs is still that of decoding."""
    dice = random.Random(4)
    cost = StepCost()
    for number in range(400):
        rows = dice.randrange(8, 33)
        tokens = rows + (2048 if number % 20 == 7 else 0)
        cost.observe(tokens, rows, gpu_step(tokens, rows))
    assert cost.slope < 10e-6
    for rows in (8, 16, 32):
        assert cost.seconds(rows) == pytest.approx(gpu_step(rows, rows), rel=0.1)


@pytest.mark.parametrize("slow", [0, 30])
def test_one_slow_step_is_soon_forgotten(slow: int) -> None:
    """The first step starts CUDA, and now and then one compiles a kernel."""
    dice = random.Random(5)
    cost = StepCost()
    for number in range(slow + 15):
        rows = dice.randrange(8, 33)
        cost.observe(rows, rows, gpu_step(rows, rows) + (3.0 if number == slow else 0.0))
    assert cost.seconds(16) == pytest.approx(gpu_step(16, 16), rel=0.2)


def test_tokens_of_a_row() -> None:
    cost = StepCost()
    cost.observe(30, 10, 0.1)
    assert cost.tokens_per_row == pytest.approx(3.0)


# -- when an expert waits -------------------------------------------------------------------------------------


def speeds_of_cycles(rows: int, rate: float, base: tuple[float, float], expert: tuple[float, float]) -> list[float]:
    """By brute force: tokens per second of a cycle of 1, 2, 3, ... base steps and an expert step."""
    speeds = []
    gained, seconds, active, parked = 0.0, 0.0, float(rows), 0.0
    for _ in range(60):
        seconds += base[0] + base[1] * active
        gained += active
        parked, active = parked + active * rate, active * (1 - rate)
        speeds.append(gained / (seconds + expert[0] + expert[1] * parked))
    return speeds


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.9])
@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ((0.001, 0.00002), (0.002, 0.00005)),
        ((0.001, 0.0), (0.010, 0.0)),
        ((0.004, 0.0002), (0.030, 0.0005)),
        ((0.001, 0.0001), (0.001, 0.001)),
    ],
)
def test_it_steps_where_a_longer_cycle_would_hardly_be_faster(
    rate: float, base: tuple[float, float], expert: tuple[float, float]
) -> None:
    it = pacer(max_wait=100.0)
    learn(it, 0, *base)
    learn(it, 1, *expert)
    active, parked = 32.0, 0.0
    steps = 0
    while True:
        steps += 1
        it.observe(0, round(active), round(active), base[0] + base[1] * active, gained=active)
        parked, active = parked + active * rate, active * (1 - rate)
        if not it.should_wait(1, outlook(parked=max(1, round(parked)), progress=active)):
            break
    speeds = speeds_of_cycles(32, rate, base, expert)
    assert speeds[steps - 1] > 0.93 * max(speeds)
    assert steps <= speeds.index(max(speeds)) + 1, "no longer than the fastest cycle"


def ready_to_hold(**options: Any) -> Pacer:
    """A pacer for which, by costs, waiting pays."""
    it = pacer(**options)
    learn(it, 0, 0.001, 0.0)
    learn(it, 1, 0.050, 0.0)
    it.observe(0, 32, 32, 0.001, gained=32.0)
    return it


def test_it_holds_only_while_the_base_gains() -> None:
    assert ready_to_hold().should_wait(1, outlook())
    assert not ready_to_hold().should_wait(1, outlook(progress=0.0))
    assert not ready_to_hold().should_wait(1, outlook(parked=0))


def test_nobody_waits_longer_than_the_limit() -> None:
    assert ready_to_hold(now=0.19, max_wait=0.2).should_wait(1, outlook())
    assert not ready_to_hold(now=0.2, max_wait=0.2).should_wait(1, outlook())
    assert not ready_to_hold(max_wait=0.0).should_wait(1, outlook())


def test_requests_that_an_expert_serves_alone_are_not_held_back() -> None:
    assert not ready_to_hold().should_wait(1, outlook(alone=1))


def test_without_gather_only_rows_that_draft_wait() -> None:
    assert not ready_to_hold(gather="off").should_wait(1, outlook(parked=4, drafting=3))
    assert ready_to_hold(gather="off").should_wait(1, outlook(parked=4, drafting=4))


def test_a_number_of_drafts_is_not_second_guessed() -> None:
    """Also where nothing is known of costs, and whatever they are."""
    for gather in ("off", "auto", 2):
        assert pacer(gather=gather).should_wait(1, outlook(parked=4, drafting=4, fixed_window=4))
        assert not pacer(gather=gather).should_wait(1, outlook(parked=4, drafting=4, fixed_window=3))
        assert not pacer(now=9.0, gather=gather).should_wait(1, outlook(parked=4, drafting=4, fixed_window=4))


def test_a_number_waits_for_that_many() -> None:
    assert pacer(gather=5).should_wait(1, outlook(parked=4))
    assert not pacer(gather=5).should_wait(1, outlook(parked=5))
    assert not pacer(now=9.0, gather=5).should_wait(1, outlook(parked=4))


def test_nothing_waits_while_nothing_is_known() -> None:
    assert not pacer().should_wait(1, outlook())


# -- which drafts pay -----------------------------------------------------------------------------------------


def test_drafts_pay_by_what_a_row_costs() -> None:
    it = pacer()
    assert it.draft_pays(0.5)
    assert not it.draft_pays(0.49)
    learn(it, 0, 0.001, 0.0001)
    learn(it, 1, 0.004, 0.0003)
    for _ in range(60):
        it.observe(0, 32, 32, 0.0042, gained=32.0)
        it.observe(1, 8, 8, 0.0064)
    # A row in both costs 0.4 ms; a token takes (4.2 + 6.4) / 32 = 0.33 ms: drafts do not pay, however sure.
    assert not it.draft_pays(0.99)
    cheap = pacer()
    learn(cheap, 0, 0.004, 0.00001)
    learn(cheap, 1, 0.010, 0.00002)
    for _ in range(60):
        cheap.observe(0, 8, 8, 0.0041, gained=8.0)
        cheap.observe(1, 2, 2, 0.0100)
    assert cheap.draft_pays(0.1)
    assert not cheap.draft_pays(0.01)


# -- in the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", ["off", "auto", 3])
@pytest.mark.parametrize("gather", ["off", "auto", 3])
def test_whatever_waits_the_answers_are_the_same(gather: Any, run_ahead: Any) -> None:
    pair = Pair(experts=2, vocab_size=3, max_num_seqs=16)
    it = Pacer(pair.lanes, gather=gather, max_wait=0.01)
    scheduler = make_scheduler(pair, run_ahead=run_ahead, draft_pays=it.draft_pays)
    lanes = make_lanes(pair, token_budget=20, kv_tokens=300)
    loop = StepLoop(scheduler, list(lanes), "lockstep", it)
    requests = mixed_requests(80, pair, seed=5)
    for item in requests:
        scheduler.add(item)
    ledger = Ledger()
    while loop.step():
        ledger.take(scheduler.take_deltas())
    ledger.take(scheduler.take_deltas())
    for item in requests:
        check(ledger.got[item.request_id], item, pair)
    assert [lane.leftovers() for lane in lanes] == [[]] * pair.lanes


def test_gather_saves_expert_steps_and_bounds_the_wait() -> None:
    def run(gather: Any) -> tuple[int, float]:
        pair = Pair(max_num_seqs=16)
        # The expert is five times as slow as the base.
        base, expert = make_lanes(pair)
        base._step_seconds, expert._step_seconds = 0.001, 0.005
        scheduler = make_scheduler(pair)
        loop = StepLoop(scheduler, [base, expert], "lockstep", Pacer(2, gather=gather, max_wait=1000.0))
        for number in range(16):
            scheduler.add(request(str(number), [number], policy="random", rate=0.1, max_tokens=40, seed=number))
        while loop.step():
            scheduler.take_deltas()
        waits = scheduler.take_expert_waits()
        return expert.stats().steps, max(waits)

    at_once, _ = run("off")
    gathered, longest = run("auto")
    assert gathered < 0.8 * at_once
    assert longest < 1000.0

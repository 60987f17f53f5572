"""Taking experts' tokens back: against brute force, whatever the lanes do; what is held back, counted, refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from engine.blends import Blend
from engine.hindsight import Hindsight
from engine.lanes.interface import LaneWork
from engine.strategies.deferral.backtracking import BacktrackingDecoding
from engine.strategies.deferral.strategy import DeferralDecoding
from engine.types import BASE, StructuredOutputs
from tests.engine.builders import EXPERT_WRITES, Rig, make_scheduler, request, sample
from tests.engine.oracle import Pair, check
from tests.engine.test_scheduler_machine import SchedulerMachine, must_be_found

AFTER = Hindsight(2, (0.0, 0.0, 0.0, 0.0), 0.5)
"""Two tokens are read, the expert's and one more; only what the base says then counts."""
GLAD, SORRY = -5.0, 5.0


class RegretMachine(SchedulerMachine):
    focus = "regret"


TestRegretMachine = RegretMachine.TestCase
TestRegretMachine.settings = settings(
    max_examples=150, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("ahead", [1, 2, 4, 16])
@pytest.mark.parametrize("run_ahead", ["off", 1, 7])
def test_it_is_what_brute_force_writes(ahead: int, run_ahead: Any) -> None:
    pair = Pair(experts=2, hindsight=Hindsight(ahead, (0.1, -0.2, 0.3, 0.2), 0.5), policy="random")
    rig = Rig(experts=2, hindsight=pair.hindsight, policy="random")
    asked = [
        request(str(seed), [seed], max_tokens=20, seed=seed, regret=0.4, rate=0.5, run_ahead=run_ahead, looks=True)
        for seed in range(30)
    ]
    rig.add(*asked)
    got = rig.run()
    for each in asked:
        check(got[each.request_id], each, pair)
    counters = rig.scheduler.counters
    assert counters.regretted == sum(len(each.regretted) for each in got.values()) > 30
    assert counters.revoked >= counters.regretted


# -- step by step ---------------------------------------------------------------------------------------------


class Steps:
    """One request of a base and an expert, whose samples are given by hand. The prompt has three tokens."""

    def __init__(self, hindsight: Hindsight = AFTER, **fields: Any) -> None:
        self.scheduler = make_scheduler(Pair(hindsight=hindsight))
        self.request = request(**{"regret": 0.5, "run_ahead": "off", "max_tokens": 10, **fields})
        self.scheduler.add(self.request)
        self.told: list[LaneWork] = []

    def land(self, lane: int, position: int, token: int, *, regret: float = GLAD, **more: Any) -> list[int]:
        """The lane is planned for and says this; the tokens that are handed out then."""
        self.told.append(self.scheduler.plan(lane))
        reading = sample("a", position, token, top_probability=0.5, regret=regret, **more)
        self.scheduler.land(lane, [reading])
        return [token for delta in self.scheduler.take_deltas() for token in delta.tokens]


def test_a_disputed_token_is_held_until_it_stands() -> None:
    steps = Steps()
    assert steps.land(0, 3, 5) == [5]
    assert steps.land(0, 4, 6, gate=EXPERT_WRITES) == []
    assert steps.land(1, 4, 7) == []  # 7, not 6
    assert steps.land(0, 5, 8) == []  # one token is read
    assert steps.land(0, 6, 9, regret=GLAD) == [7, 8, 9]
    assert steps.scheduler.counters.regretted == 0


def test_what_is_regretted_is_taken_back_and_the_bases_own_stands() -> None:
    steps = Steps()
    steps.land(0, 3, 5)
    steps.land(0, 4, 6, gate=EXPERT_WRITES)
    steps.land(1, 4, 7)
    steps.land(0, 5, 8)
    assert steps.land(0, 6, 9, regret=SORRY) == [6]
    counters = steps.scheduler.counters
    assert (counters.regretted, counters.revoked) == (1, 2)
    assert steps.land(0, 5, 4) == [4]
    (extension,) = steps.told[-1].extend
    assert (extension.keep, extension.tokens, extension.final) == (1, [6], 2)


def test_an_expert_that_agrees_is_not_looked_back_at() -> None:
    steps = Steps()
    steps.land(0, 3, 5, gate=EXPERT_WRITES)
    assert steps.land(1, 3, 5) == [5]


def test_no_lane_is_told_that_what_is_held_is_final() -> None:
    steps = Steps()
    steps.land(0, 3, 5, gate=EXPERT_WRITES)
    steps.land(1, 3, 7)
    steps.land(0, 4, 8, gate=EXPERT_WRITES)
    steps.land(1, 4, 8)
    (opened,) = steps.told[1].add
    assert opened.final == 0
    assert [each.final for work in steps.told for each in work.extend] == [0, 0]


def test_where_the_text_ends_the_base_looks_back_from_its_last_position() -> None:
    steps = Steps(max_tokens=2)
    steps.land(0, 3, 5, gate=EXPERT_WRITES)
    steps.land(1, 3, 7)
    assert steps.land(0, 4, 8, regret=SORRY) == [5]  # and so the text goes on
    assert steps.land(0, 4, 9) == [9]
    assert steps.scheduler.running == 0


def test_a_stop_token_that_an_expert_writes_may_be_regretted() -> None:
    steps = Steps(stop_token_ids=(7,))
    steps.land(0, 3, 5, gate=EXPERT_WRITES, regret=SORRY)
    assert steps.land(1, 3, 7) == [5]  # nothing could be read behind it


def test_an_expert_token_that_is_taken_back_is_not_counted_against_the_limit() -> None:
    steps = Steps(max_expert_tokens=1)
    steps.land(0, 3, 5, gate=EXPERT_WRITES)
    steps.land(1, 3, 7)
    steps.land(0, 4, 8)
    assert steps.land(0, 5, 8, regret=SORRY) == [5]
    steps.land(0, 4, 6, gate=EXPERT_WRITES)
    steps.land(1, 4, 9)
    steps.land(0, 5, 8)
    assert steps.land(0, 6, 4, regret=GLAD) == [9, 8, 4]


def test_tokens_before_min_tokens_are_not_questioned() -> None:
    steps = Steps(min_tokens=1)
    steps.land(0, 3, 5, gate=EXPERT_WRITES)
    assert steps.land(1, 3, 7) == [7]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_ends_the_request_and_gives_what_was_held(value: float) -> None:
    steps = Steps()
    steps.land(0, 3, 5, gate=EXPERT_WRITES)
    steps.land(1, 3, 7)
    steps.land(0, 4, 8)
    steps.scheduler.plan(0)
    steps.scheduler.land(0, [sample("a", 5, 9, top_probability=0.5, regret=value)])
    (delta,) = steps.scheduler.take_deltas()
    assert (delta.tokens, delta.error) == ([7, 8], "the regret's value is not finite")
    assert steps.scheduler.counters.gate_errors == 1


# -- what cannot be had ---------------------------------------------------------------------------------------


def refusal(asked: dict[str, Any], **options: Any) -> tuple[str | None, str | None]:
    hindsight = options.pop("hindsight", AFTER)
    scheduler = make_scheduler(Pair(hindsight=hindsight), **options)
    scheduler.add(request(**asked))
    (delta,) = scheduler.take_deltas() or [None]
    return (None, None) if delta is None else (delta.field, delta.error)


@pytest.mark.parametrize(
    ("options", "fields", "reason"),
    [
        ({"hindsight": None}, {}, "no regret artifact"),
        ({"drafting": False}, {}, "cannot take tokens back"),
        ({}, {"structured_outputs": StructuredOutputs(json_object=True)}, "an answer of a given form"),
    ],
)
def test_who_asks_for_what_cannot_be_had_is_told(options: Any, fields: Any, reason: str) -> None:
    field, error = refusal({"regret": 0.5, **fields}, **options)
    assert field == "collaboration.regret"
    assert error is not None
    assert reason in error
    assert "leave" in error
    # The default is for those who can have it, and 1 asks for nothing.
    assert refusal(fields, regret=0.5, **options) == (None, None)
    assert refusal({"regret": 1.0, **fields}, **options) == (None, None)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"blend": Blend("product", ((0, 1.0), (1, 1.0)))}, "members write together"),
        ({"scores": True, "prompt_logprobs": 1}, "a text that is scored"),
    ],
)
def test_where_no_expert_writes_a_token_of_its_own(fields: Any, reason: str) -> None:
    field, error = refusal({"regret": 0.5, **fields})
    assert field == "collaboration.regret"
    assert error is not None
    assert reason in error
    assert error.endswith("leave it out")
    assert refusal({"regret": 1.0, **fields}) == (None, None)


def test_what_is_in_force_is_told() -> None:
    scheduler = make_scheduler(Pair(hindsight=AFTER), regret=0.25)
    scheduler.add(request())
    scheduler.plan(BASE)
    scheduler.land(BASE, [sample(top_probability=0.5)])
    (delta,) = scheduler.take_deltas()
    assert delta.collaboration is not None
    assert delta.collaboration.regret == 0.25


# -- sabotages ------------------------------------------------------------------------------------------------


def keeps_lanes_uncut(self: DeferralDecoding) -> None:
    self.window.clear()


def looks_back_from_the_draft(self: BacktrackingDecoding, row: Any, last: int) -> Any:
    return LOOK(self, self.held[self.disputed[0] - self._first].draft, last)


def forgets_experts(self: BacktrackingDecoding, index: int) -> Any:
    written = self.expert_tokens
    yield from TAKE_BACK(self, index)
    self.expert_tokens = written


LOOK = BacktrackingDecoding._look_back
TAKE_BACK = BacktrackingDecoding._take_back
PATCHES: dict[str, tuple[str, Callable[..., Any]]] = {
    "lanes are not told of a cut": ("_cut", keeps_lanes_uncut),
    "the base looks from where the expert wrote": ("_look_back", looks_back_from_the_draft),
    "experts' tokens count though taken back": ("_take_back", forgets_experts),
    "held tokens are handed out": ("_settled", property(lambda self: len(self.decided))),
}


@pytest.mark.parametrize("sabotage", PATCHES)
def test_a_sabotage_is_found(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, broken = PATCHES[sabotage]
    monkeypatch.setattr(BacktrackingDecoding, name, broken)
    must_be_found(RegretMachine, "regret")

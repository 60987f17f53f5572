"""Scoring a text by the joint model: windows, lanes that are lost, refusals. The machine drives it with everything."""

from __future__ import annotations

import pytest

from engine.blends import Blend
from engine.strategies.scoring import LONGEST_WINDOW, WINDOW_ELEMENTS, ScoringDecoding, window_of
from engine.types import ErrorCode, PolicyName
from tests.engine.builders import Rig, make_scheduler, request
from tests.engine.oracle import Pair, check
from tests.engine.test_scheduler_machine import SchedulerMachine, must_be_found

TEXT = [(7 * number) % 16 for number in range(1, 30)]


@pytest.mark.parametrize("policy", ["threshold", "confidence", "always"])
@pytest.mark.parametrize("blend", [None, Blend("product", ((0, 1.0), (1, 0.5), (2, 1.0)))])
@pytest.mark.parametrize("token_budget", [4, 500])
def test_windows_change_nothing(policy: PolicyName, blend: Blend | None, token_budget: int) -> None:
    asked = request(prompt=TEXT, scores=True, prompt_logprobs=1, policy=policy, blend=blend)
    found = []
    for window in (1, 3, 28, 100):
        rig = Rig(experts=2, score_window=window, lanes={"token_budget": token_budget})
        rig.add(asked)
        got = rig.run()["a"]
        check(got, asked, rig.pair)
        found.append(got.prompt_logprobs)
    assert found[0] is not None
    assert len(found[0]) == len(TEXT) - 1
    assert found == [found[0]] * 4


def test_a_window_is_bounded_by_memory() -> None:
    assert window_of(1024) == LONGEST_WINDOW
    assert window_of(151_936) * 151_936 <= WINDOW_ELEMENTS
    assert window_of(1 << 30) == 1


def test_an_expert_that_is_lost_within_its_turn_ends_the_request() -> None:
    """It has spoken of some of its positions, so nobody is waited for any more."""
    rig = Rig(score_window=100, lanes={"token_budget": 4})
    rig.scheduler.add(request(prompt=TEXT, scores=True, prompt_logprobs=0, policy="always"))
    while rig.lanes[1].stats().steps < 2:
        rig.step(0)
        rig.step(1)
    rig.scheduler.lose(1)
    (delta,) = rig.scheduler.take_deltas()
    assert (delta.finish_reason, delta.code) == ("error", ErrorCode.STEP_TIMEOUT)
    assert rig.scheduler.running == 0


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        ({"prompt": [1]}, "one token", "score"),
        ({"member": 1}, "a member alone", "score"),
        ({"prompts": ((1, [1, 2]),)}, "leave prompts out", "prompts"),
        ({"blend": Blend("mixture", ((0, 0.5), (1, 0.4)))}, "sum to 1", "blend"),
        ({"experts": (3,)}, "does not exist", "experts"),
    ],
)
def test_what_cannot_be_scored(fields: dict[str, object], message: str, field: str) -> None:
    scheduler = make_scheduler(Pair())
    scheduler.add(request(**{"prompt": TEXT, **fields}, scores=True))
    (delta,) = scheduler.take_deltas()
    assert delta.refused
    assert delta.error is not None
    assert message in delta.error
    assert delta.field == f"collaboration.{field}"


def test_lanes_that_cannot_be_cut() -> None:
    scheduler = make_scheduler(Pair(), drafting=False)
    scheduler.add(request(prompt=TEXT, scores=True))
    (delta,) = scheduler.take_deltas()
    assert delta.refused


def test_the_machine_finds_samples_from_behind_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def awaits(self: ScoringDecoding, lane: int, position: int) -> bool:
        return lane == self.turn and bool(self.pending) and position == self.pending[0]

    monkeypatch.setattr(ScoringDecoding, "awaits", awaits)
    must_be_found(SchedulerMachine, "scores")


def test_the_machine_finds_limits_of_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = property(lambda self: self.answer.request.collaboration.max_expert_tokens != 0)
    monkeypatch.setattr(ScoringDecoding, "may_defer", limit)
    must_be_found(SchedulerMachine, "scores")

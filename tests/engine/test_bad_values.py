"""Gate values and top probabilities that are no numbers: never a silent decision, and nobody fails who needs none."""

from __future__ import annotations

import math

import pytest

from engine.lanes import Sample
from tests.engine.builders import request, sample
from tests.engine.test_scheduler import only, scheduler


@pytest.mark.parametrize("policy", ["threshold", "sample"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gate_that_is_not_finite_ends_its_request_only(bad: float, policy: str) -> None:
    it = scheduler()
    it.add(request("a", policy=policy))
    it.add(request("b", policy="never"))
    it.plan(0)
    it.land(0, [sample("a", gate=bad, top_probability=0.5), sample("b")])
    first, second = it.take_deltas()
    assert (first.request_id, first.tokens, first.finish_reason) == ("a", [], "error")
    assert first.error == "the gate's value is not finite"
    assert (second.request_id, second.tokens, second.finish_reason) == ("b", [5], None)
    assert it.counters.gate_errors == 1
    assert it.plan(0).remove == ["a"]


@pytest.mark.parametrize(
    ("policy", "source", "deferral"), [("always", 1, None), ("never", 0, None), ("random", 1, None),
                                       ("confidence", 1, 0.75)],
)  # fmt: skip
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_policy_that_needs_no_gate_goes_on_without(
    bad: float, policy: str, source: int, deferral: float | None
) -> None:
    it = scheduler()
    it.add(request("a", policy=policy, rate=1.0))
    it.plan(0)
    it.land(0, [sample(gate=bad, top_probability=0.25)])
    if source:
        it.plan(1)
        it.land(1, [sample()])
    delta = only(it.take_deltas())
    assert (delta.sources, delta.deferrals, delta.finish_reason) == ([source], [deferral], None)
    assert it.counters.gate_errors == 0


@pytest.mark.parametrize("policy", ["always", "random", "confidence"])
def test_where_the_gate_has_to_choose_the_expert_it_is_needed(policy: str) -> None:
    it = scheduler(experts=2)
    it.add(request("a", policy=policy, rate=1.0))
    it.add(request("b", policy="never"))
    it.plan(0)
    it.land(0, [Sample(name, 3, 5, [math.nan, 0.0], 0.25) for name in "ab"])
    first, second = it.take_deltas()
    assert (first.finish_reason, first.error) == ("error", "the gate's value is not finite")
    assert (second.tokens, second.deferrals, second.finish_reason) == ([5], [None], None)
    assert it.counters.gate_errors == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5, 1.5])
def test_a_top_probability_that_is_none_ends_its_request(bad: float) -> None:
    it = scheduler()
    it.add(request("a", policy="confidence"))
    it.plan(0)
    it.land(0, [sample(top_probability=bad)])
    assert only(it.take_deltas()).finish_reason == "error"
    assert it.counters.gate_errors == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5, 1.5])
def test_an_expert_that_does_not_say_how_sure_it_is_ends_a_request_with_a_veto(bad: float) -> None:
    it = scheduler()
    it.add(request("a", policy="always", veto=0.5))
    it.plan(0)
    it.land(0, [sample(gate=0.0)])
    it.plan(1)
    it.land(1, [sample(top_probability=bad)])
    delta = only(it.take_deltas())
    assert (delta.finish_reason, delta.error) == ("error", "the expert's top probability is not finite")


def test_nobody_looks_at_the_gate_of_a_member_alone() -> None:
    it = scheduler()
    it.add(request("a", member=0))
    it.plan(0)
    it.land(0, [sample(gate=math.nan)])
    assert only(it.take_deltas()).tokens == [5]
    assert it.counters.gate_errors == 0

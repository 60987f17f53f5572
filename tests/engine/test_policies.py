"""Each policy on positions made by hand, and the gate's values against numbers worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import get_args

import pytest
from scipy.stats import binomtest, chisquare

from engine import draws
from engine.strategies.deferral.policies import POLICIES, Position, read_gate
from engine.types import BASE, PolicyName

LEVEL = 1e-6
ONE = [(1, 0.7)]
THREE = [(1, 0.2), (2, 0.4), (3, 0.1)]


def position(
    deferral: float | None = 0.7,
    weights: list[tuple[int, float]] = ONE,
    threshold: float = 0.5,
    rate: float = 0.5,
    draw: float = 0.5,
) -> Position:
    return Position(deferral, weights, threshold, rate, draw)


def decide(policy: PolicyName, **fields: object) -> int:
    return POLICIES[policy].decide(position(**fields))  # type: ignore[arg-type]


def test_every_policy_name_has_its_policy() -> None:
    assert set(POLICIES) == set(get_args(PolicyName))
    assert all(policy.name == name for name, policy in POLICIES.items())


def test_needs() -> None:
    needs = {name: policy.needs for name, policy in POLICIES.items() if policy.needs}
    assert needs == {"threshold": "gate", "sample": "gate", "confidence": "top_probability"}


# -- policies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["threshold", "confidence"])
@pytest.mark.parametrize(
    ("deferral", "threshold", "writer"),
    [(0.7, 0.5, 1), (0.3, 0.5, BASE), (0.5, 0.5, BASE), (1.0, 1.0, BASE), (0.0, 0.0, BASE), (1e-9, 0.0, 1)],
)
def test_defers_above_the_threshold_only(policy: PolicyName, deferral: float, threshold: float, writer: int) -> None:
    assert decide(policy, deferral=deferral, threshold=threshold) == writer


@pytest.mark.parametrize("policy", ["threshold", "confidence", "always", "random"])
def test_likeliest_expert_writes(policy: PolicyName) -> None:
    assert decide(policy, weights=THREE, draw=0.1) == 2
    assert decide(policy, weights=[(3, 0.35), (1, 0.35)], draw=0.1) == 3, "the first on a tie"


def test_always_and_never() -> None:
    for draw in (0.0, 0.999):
        for deferral in (0.0, 1.0, None):
            assert decide("always", deferral=deferral, draw=draw, threshold=1.0, rate=0.0) == 1
            assert decide("never", deferral=deferral, draw=draw, threshold=0.0, rate=1.0) == BASE


@pytest.mark.parametrize(
    ("rate", "draw", "writer"), [(0, 0.0, BASE), (1, 1 - 2**-53, 1), (0.3, 0.3, BASE), (0.3, 0.29, 1)]
)
def test_random_compares_draw_and_rate(rate: float, draw: float, writer: int) -> None:
    assert decide("random", rate=rate, draw=draw, deferral=None) == writer


@pytest.mark.parametrize(
    ("draw", "writer"), [(0.0, 1), (0.19, 1), (0.21, 2), (0.59, 2), (0.61, 3), (0.69, 3), (0.71, BASE), (0.999, BASE)]
)
def test_sample_cuts_the_draw_into_shares(draw: float, writer: int) -> None:
    assert decide("sample", weights=THREE, draw=draw) == writer


def test_sample_looks_at_the_draw_alone() -> None:
    assert decide("sample", threshold=1.0, rate=0.0, draw=0.69) == 1
    assert decide("sample", threshold=0.0, rate=1.0, draw=0.71) == BASE


@pytest.mark.parametrize("seed", range(5))
def test_sample_defers_in_proportion(seed: int) -> None:
    """Over the positions of a request, base and experts write as often as the gate says."""
    count = 20_000
    uniforms = [draws.uniform(seed, draws.POLICY_STREAM, at) for at in range(count)]
    writers = Counter(decide("sample", weights=THREE, draw=draw) for draw in uniforms)
    observed = [writers[lane] for lane in range(4)]
    assert chisquare(observed, [count * share for share in (0.3, 0.2, 0.4, 0.1)]).pvalue > LEVEL


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_random_defers_at_its_rate(rate: float) -> None:
    count = 20_000
    uniforms = [draws.uniform(11, draws.POLICY_STREAM, at) for at in range(count)]
    deferred = sum(decide("random", rate=rate, draw=draw) != BASE for draw in uniforms)
    assert binomtest(deferred, count, rate).pvalue > LEVEL


# -- the gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "deferral"),
    [(0.0, 0.5), (math.log(3), 0.75), (-math.log(3), 0.25), (2.0, 0.8807970779778823), (1000.0, 1.0), (-1000.0, 0.0)],
)
def test_one_expert_is_the_logistic_function(logit: float, deferral: float) -> None:
    got, weights = read_gate([logit], [1])
    assert got == pytest.approx(deferral, rel=1e-14)
    assert weights == [(1, got)]


def test_tie_is_exact() -> None:
    """A gate that is not sure does not defer at the threshold 0.5."""
    assert read_gate([0.0], [1])[0] == 0.5
    assert read_gate([-0.0], [1])[0] == 0.5


LOGITS = [math.log(2), math.log(4), 0.0]
"""Beside the base's 1: odds of 2, 4 and 1, eighths in all."""


@pytest.mark.parametrize(
    ("experts", "deferral", "weights"),
    [
        ((1, 2, 3), 7 / 8, [2 / 8, 4 / 8, 1 / 8]),
        ((1, 3), 3 / 4, [2 / 4, 1 / 4]),
        ((3, 2), 5 / 6, [1 / 6, 4 / 6]),
        ((2,), 4 / 5, [4 / 5]),
    ],
)
def test_softmax_over_the_allowed(experts: tuple[int, ...], deferral: float, weights: list[float]) -> None:
    got, shares = read_gate(LOGITS, experts)
    assert got == pytest.approx(deferral, rel=1e-14)
    assert [lane for lane, _ in shares] == list(experts)
    assert [share for _, share in shares] == pytest.approx(weights, rel=1e-14)


@pytest.mark.parametrize(
    ("logits", "deferral", "weights"),
    [
        ([1000.0, -1000.0, 0.0], 1.0, [1.0, 0.0, 0.0]),
        ([1000.0, 1000.0, 1000.0], 1.0, [1 / 3, 1 / 3, 1 / 3]),
        ([-1000.0, -1000.0, -1000.0], 0.0, [0.0, 0.0, 0.0]),
        ([1e308, -1e308, 1e308], 1.0, [0.5, 0.0, 0.5]),
    ],
)
def test_extreme_logits_do_not_overflow(logits: list[float], deferral: float, weights: list[float]) -> None:
    got, shares = read_gate(logits, (1, 2, 3))
    assert got == pytest.approx(deferral)
    assert [share for _, share in shares] == pytest.approx(weights)


def test_tiny_probabilities_keep_their_digits() -> None:
    """Not 1 - (nearly 1): thresholds near 0 must mean something."""
    assert read_gate([-40.0], [1])[0] == pytest.approx(math.exp(-40.0), rel=1e-12)
    assert read_gate([-40.0, -41.0], [1, 2])[0] == pytest.approx(math.exp(-40.0) + math.exp(-41.0), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("experts", [(1,), (1, 2, 3)])
def test_values_that_are_not_finite_decide_nothing(bad: float, experts: tuple[int, ...]) -> None:
    deferral, weights = read_gate([bad, 0.0, 0.0], experts)
    assert math.isnan(deferral)
    assert [lane for lane, _ in weights] == list(experts)
    assert all(math.isnan(weight) for _, weight in weights)


@pytest.mark.parametrize("name", ["always", "random", "confidence"])
def test_which_expert_is_not_chosen_by_a_gate_that_is_not_finite(name: PolicyName) -> None:
    weights = [(1, math.nan), (2, math.nan)]
    with pytest.raises(ValueError, match="not finite"):
        POLICIES[name].decide(Position(0.9, weights, threshold=0.5, rate=1.0, draw=0.0))
    assert POLICIES[name].decide(Position(0.9, weights[1:], threshold=0.5, rate=1.0, draw=0.0)) == 2


def test_only_the_allowed_experts_are_read() -> None:
    assert read_gate([math.nan, 0.0], [2]) == (0.5, [(2, 0.5)])

"""Thresholds by the share of tokens that experts write, and by what they cost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.shares import threshold_of, threshold_within
from tests.server.conftest import Build

CURVE = [(1.0, 0.0), (0.9, 0.1), (0.5, 0.2), (0.1, 0.4), (-1.0, 1.0)]
"""As a calibration stores it: the threshold -1 defers everything."""

COSTS = [(1.0, 0.0), (0.9, 0.002), (0.5, 0.001), (0.1, 0.004), (-1.0, 0.01)]
"""Seconds per token; at 0.5 they were measured to be fewer than at 0.9, where experts write less."""

curves = st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=8).map(
    lambda points: list(
        zip(sorted((at for at, _ in points), reverse=True), sorted(share for _, share in points), strict=True)
    )
)


@pytest.mark.parametrize(("share", "threshold"), [(0.0, 1.0), (0.1, 0.9), (0.2, 0.5), (0.4, 0.1), (1.0, 0.0)])
def test_the_curve_s_own_points(share: float, threshold: float) -> None:
    assert threshold_of(share, CURVE) == pytest.approx(threshold)


def odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_between_points_log_odds_of_both_are_in_proportion() -> None:
    part = (odds(0.15) - odds(0.1)) / (odds(0.2) - odds(0.1))
    assert odds(threshold_of(0.15, CURVE)) == pytest.approx((1 - part) * odds(0.9))


TAIL = [(16.0, 0.0134), (14.0, 0.0359), (11.955, 0.0937), (10.8, 0.1468), (-8.1, 0.292), (-10.8, 0.4839), (-14, 0.775)]
"""(Log-odds of the threshold, share) of the demo's gate on its validation questions."""


def stored(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """As a calibration has them, with what defers nothing and all."""
    return [(1.0, 0.0), *((1 / (1 + math.exp(-at)), share) for at, share in points), (-1.0, 1.0)]


@pytest.mark.parametrize("at", [0, 1, 6])
def test_beyond_the_points_of_an_old_curve_the_outer_lines_go_on(at: int) -> None:
    """Without the gate's greatest and least values in it, the lines say nearly what was measured there."""
    threshold, share = TAIL[at]
    found = odds(threshold_of(share, stored(TAIL[2:6])))
    assert found == pytest.approx(threshold, abs=1.5)


def test_a_single_point_of_an_old_curve() -> None:
    assert odds(threshold_of(0.05, stored([(3.0, 0.1)]))) == pytest.approx(3.0 + odds(0.1) - odds(0.05))
    assert threshold_of(0.2, stored([])) == pytest.approx(0.8)


def test_shares_below_the_first_rate_of_a_sweep_stay_below_the_gate_s_greatest_value() -> None:
    """A gate that says 0.6 at most, with a twentieth of its tokens at 0.58 or more."""
    curve = [(1.0, 0.0), (0.6, 0.0), (0.58, 0.05), (0.3, 0.2), (0.1, 0.9), (0.08, 1.0), (-1.0, 1.0)]
    assert 0.58 < threshold_of(0.02, curve) < 0.6
    assert 0.08 < threshold_of(0.98, curve) < 0.1
    assert 0.58 < threshold_within(0.02, curve) < 0.6


def test_noise_near_the_first_point_makes_no_steep_line() -> None:
    curve = stored([(3.0, 0.0999), (2.0, 0.1), (1.0, 0.3)])
    assert odds(threshold_of(0.05, curve)) < 5


@given(curves, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_more_tokens_need_no_higher_threshold(curve: list[tuple[float, float]], one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert 1.0 >= threshold_of(less, curve) >= threshold_of(more, curve) - 1e-8 >= -1e-8


async def test_a_share_becomes_a_threshold(build: Build) -> None:
    house = await build(curve=CURVE)
    response = await house.complete(collaboration={"share": 0.2})
    assert response.status_code == 200
    assert house.engine.seen[0].collaboration.threshold == pytest.approx(0.5)
    served = (await house.http.get("/v1/models")).json()["data"][0]["collaboration"]
    assert served["curve"][0] == {"threshold": 0.0, "share": 1.0}
    assert [point["share"] for point in served["curve"]] == [1.0, 0.4, 0.2, 0.1, 0.0]


@pytest.mark.parametrize(
    ("cost", "threshold"),
    [(0.0, 1.0), (0.002, 0.5), (0.004, 0.1), (0.01, 0.0), (1.0, 0.0)],
)
def test_the_lowest_threshold_that_a_cost_allows(cost: float, threshold: float) -> None:
    assert threshold_within(cost, COSTS) == pytest.approx(threshold)


def test_between_points_a_cost_counts_as_its_part_of_the_greatest() -> None:
    assert threshold_within(0.003, COSTS) == pytest.approx(threshold_of(0.3, [(0.5, 0.2), (0.1, 0.4)]))


def test_what_costs_more_than_was_measured_is_the_lowest_threshold_that_was() -> None:
    assert threshold_within(9.0, [(0.5, 1.0), (0.25, 2.0)]) == 0.25


@given(curves, st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_a_higher_cost_needs_no_higher_threshold(curve: list[tuple[float, float]], one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert 1.0 >= threshold_within(less, curve) >= threshold_within(more, curve) - 1e-8 >= -1e-8


async def test_a_cost_becomes_a_threshold(build: Build) -> None:
    house = await build(curve=CURVE, costs=COSTS[:-1])
    response = await house.complete(collaboration={"cost": 0.004})
    assert response.status_code == 200
    assert house.engine.seen[0].collaboration.threshold == pytest.approx(0.1)
    served = (await house.http.get("/v1/models")).json()["data"][0]["collaboration"]
    assert served["curve"][:2] == [{"threshold": 0.0, "share": 1.0}, {"threshold": 0.1, "share": 0.4, "cost": 0.004}]


@pytest.mark.parametrize(
    ("collaboration", "says"),
    [
        ({"cost": 0.2, "threshold": 0.5}, "'collaboration.threshold' say the same thing; give one of them"),
        ({"cost": 0.2, "policy": "always"}, "means nothing to the policy 'always', only to threshold"),
        ({"cost": 0.2, "experts": []}, "leave out 'experts'"),
        ({"cost": -1}, "must be at least 0"),
        ({"cost": 0.2}, "a stored calibration that measured what experts cost"),
    ],
)
async def test_costs_that_are_refused(build: Build, collaboration: dict[str, object], says: str) -> None:
    house = await build(curve=CURVE, costs=COSTS if len(collaboration) > 1 else [])
    response = await house.complete(collaboration=collaboration)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "collaboration.cost"
    assert says in error["message"]
    assert house.engine.seen == []


@pytest.mark.parametrize(
    ("collaboration", "says"),
    [
        ({"share": 0.2, "cost": 0.5}, "'collaboration.cost' say the same thing; give one of them"),
        ({"share": 0.2, "threshold": 0.5}, "give one of them"),
        ({"share": 0.2, "policy": "confidence"}, "means nothing to the policy 'confidence', only to threshold"),
        ({"share": 0.2, "experts": []}, "leave out 'experts'"),
        ({"share": 1.5}, "must be at most 1"),
    ],
)
async def test_what_is_refused(build: Build, collaboration: dict[str, object], says: str) -> None:
    house = await build(curve=CURVE)
    response = await house.complete(collaboration=collaboration)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "collaboration.share"
    assert says in error["message"]
    assert house.engine.seen == []


async def test_without_a_curve_it_is_refused(build: Build) -> None:
    house = await build()
    response = await house.complete(collaboration={"share": 0.2})
    assert response.status_code == 400
    assert "a stored calibration" in response.json()["error"]["message"]
    assert "curve" not in (await house.http.get("/v1/models")).json()["data"][0]["collaboration"]


async def test_without_a_gate_it_is_refused(build: Build) -> None:
    house = await build(gate=False)
    response = await house.complete(collaboration={"share": 0.2, "policy": "threshold"})
    assert response.status_code == 400

"""Draws: uniform, independent of each other, and pure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from engine import draws
from engine.draws import POLICY_STREAM, key, uniform

GAMMA = 0x9E3779B97F4A7C15
LEVEL = 1e-6
"""A fair generator fails a test at this level once in a million seeds; the seeds here are fixed."""

integers = st.integers(-(1 << 70), 1 << 70)
streams = st.integers(0, 8) | st.just(POLICY_STREAM)
positions = st.integers(0, 1 << 32)


SPLITMIX64 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
"""The published outputs for seed 0. The state grows by gamma before each output; ``mix`` adds the last gamma."""


@pytest.mark.parametrize(("steps", "output"), list(enumerate(SPLITMIX64)))
def test_mixing_is_splitmix64(steps: int, output: int) -> None:
    assert draws.mix(steps * GAMMA % (1 << 64)) == output


@given(seed=integers, stream=streams, position=positions)
def test_keys_are_64_bit_and_draws_below_one(seed: int, stream: int, position: int) -> None:
    assert 0 <= key(seed, stream, position) < 1 << 64
    assert 0.0 <= uniform(seed, stream, position) < 1.0


@given(seed=integers, stream=streams, position=positions)
def test_same_place_same_draw(seed: int, stream: int, position: int) -> None:
    first = uniform(seed, stream, position)
    uniform(seed + 1, stream, position)
    assert uniform(seed, stream, position) == first
    assert uniform(seed + (1 << 64), stream, position) == first


def test_largest_key_is_still_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "mix", lambda _: (1 << 64) - 1)
    assert uniform(0, 0, 0) == 1.0 - 2.0**-53


def test_no_two_places_share_a_key() -> None:
    places = itertools.product(range(-20, 20), (0, 1, 2, 3, POLICY_STREAM), range(400))
    keys = [key(*place) for place in places]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("along", ["seed", "stream", "position"])
def test_uniform_along_each_coordinate(along: str) -> None:
    start = {"seed": 7, "stream": 1, "position": 30}
    values = [uniform(**{**start, along: index}) for index in range(20_000)]
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    assert chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((7, 0, 0), (7, 1, 0)),
        ((7, 0, 0), (7, POLICY_STREAM, 0)),
        ((7, 0, 0), (8, 0, 0)),
        ((7, 0, 0), (7, 0, 1)),
    ],
    ids=["lanes", "lane and policy", "seeds", "neighbours"],
)
def test_neighbouring_draws_are_independent(one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    def along(seed: int, stream: int, first: int) -> list[float]:
        return [uniform(seed, stream, first + position) for position in range(20_000)]

    counts, _, _ = np.histogram2d(along(*one), along(*other), bins=8, range=((0, 1), (0, 1)))
    assert chisquare(counts.ravel()).pvalue > LEVEL


def test_a_bad_generator_fails_here() -> None:
    counts, _ = np.histogram([index * 0.618 % 0.99 for index in range(20_000)], bins=100, range=(0, 1))
    assert chisquare(counts).pvalue < LEVEL


def test_many_keys_at_once() -> None:
    seeds = [0, 1, -1, 1 << 63, (1 << 64) - 1, -(1 << 62), 12345]
    positions = [0, 5, 1 << 31, 7, 8191, 1, 131_071]
    expected = [draws.key(seed, draws.POLICY_STREAM, at) for seed, at in zip(seeds, positions, strict=True)]
    assert draws.keys(seeds, draws.POLICY_STREAM, positions).tolist() == expected

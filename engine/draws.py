"""Random draws as pure functions of (seed, stream, position).

A request with a seed must give the same tokens alone and in any batch, whatever is preempted, recomputed or computed
ahead of time. A generator that is advanced once a sample cannot promise that: a recomputed position would draw twice.
So nothing is advanced: each draw is keyed by where it happens.

All lanes use the same noise for a token at the same position. Only one of them writes it, so its distribution is that
lane's own; and the base's draft then equals what the expert will write as often as two samplers can that know nothing
of each other's distribution (common random numbers).

The mixing function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15
"""What SplitMix64's state grows by; 2**64 over the golden ratio."""

FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""What SplitMix64 multiplies with."""

TOKEN_STREAM = 0
"""The stream of every lane's token draws."""

POLICY_STREAM = 1 << 32
"""The stream of the policies' own draws."""

SYMBOL_STREAM = 2 << 32
"""The stream of the draws of symbols, where members write a text byte by byte."""


def mix(value: int) -> int:
    """SplitMix64's next output after a state: 64 bits, each of which depends on every bit of the state's low 64."""
    value = (value + GOLDEN_RATIO) & _MASK
    value = ((value ^ (value >> 30)) * FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * FACTORS[1]) & _MASK
    return value ^ (value >> 31)


def series(seed: int, stream: int) -> int:
    """What all draws of a seed in one stream have in common, for :func:`uniform_in`; arguments as for :func:`key`."""
    return mix(mix(seed & _MASK) ^ stream)


def key(seed: int, stream: int, position: int) -> int:
    """A 64-bit key for one draw.

    Args:
        seed: the request's seed, any integer (its low 64 bits count).
        stream: what is drawn: TOKEN_STREAM, POLICY_STREAM or SYMBOL_STREAM.
        position: number of tokens, prompt included, before the one being drawn; of symbols, without the prompt.
    """
    return mix(series(seed, stream) ^ position)


def keys(seeds: Sequence[int], stream: int, positions: Sequence[int]) -> npt.NDArray[np.uint64]:
    """:func:`key` of many draws at once, each with its own seed and position; shape [len(seeds)]."""
    of_seeds = np.fromiter((seed & _MASK for seed in seeds), dtype=np.uint64, count=len(seeds))
    return _mix_all(_mix_all(_mix_all(of_seeds) ^ np.uint64(stream)) ^ np.asarray(positions, dtype=np.uint64))


def _mix_all(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(GOLDEN_RATIO)  # arrays wrap without a warning
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def uniform_in(series: int, position: int) -> float:
    """A double in [0, 1) for one draw of a series."""
    return (mix(series ^ position) >> 11) * 2.0**-53


def uniform(seed: int, stream: int, position: int) -> float:
    """A double in [0, 1) for one draw; arguments as for :func:`key`."""
    return uniform_in(series(seed, stream), position)

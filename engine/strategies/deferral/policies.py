"""Policies: each turns the gate's value at one position into who writes the next token.

A policy is pure: everything that it may look at is in :class:`Position`, the random draw included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from engine.odds import probability
from engine.types import BASE, PolicyName

NOT_FINITE = "the gate's value is not finite"


class Position(msgspec.Struct, frozen=True, gc=False):
    """One position that is about to be written, after the base has looked at it.

    Attributes:
        deferral: probability that the base should not write here, 1 - P(Z = 0); None where the policy needs no gate
            and the pair has none, or its value is not finite.
        weights: (lane, probability) of each expert that may write, P(Z = k); sums to ``deferral``. Without a gate
            every expert weighs the same; where its value is not finite, the weights are NaN.
        threshold: the request's threshold, 0 to 1.
        rate: the request's rate, 0 to 1.
        draw: for policies that draw: uniform in [0, 1), a function of the request's seed and this position alone.
    """

    deferral: float | None
    weights: Sequence[tuple[int, float]]
    threshold: float
    rate: float
    draw: float

    @property
    def favourite(self) -> int:
        """The lane of the most probable expert; the first one on a tie.

        Raises:
            ValueError: there is a choice, and the gate's value, which should make it, is not finite.
        """
        if len(self.weights) == 1:
            return self.weights[0][0]
        if any(math.isnan(weight) for _, weight in self.weights):
            raise ValueError(NOT_FINITE)
        return max(self.weights, key=lambda item: item[1])[0]


class Policy(msgspec.Struct, frozen=True):
    """A named decision rule.

    Attributes:
        needs: "gate": only served where the pair has a gate. "top_probability": the base's lane reports its top
            probability for this request's rows. None: needs nothing.
        draws: whether it looks at ``Position.draw``.
        has_threshold: whether it looks at ``Position.threshold``.
        decide: returns the lane that writes the next token; 0 is the base.
    """

    name: PolicyName
    needs: Literal["gate", "top_probability"] | None
    decide: Callable[[Position], int]
    draws: bool = False
    has_threshold: bool = False


def read_gate(logits: Sequence[float], experts: Sequence[int]) -> tuple[float, list[tuple[int, float]]]:
    """Softmax over [0, z_1, ..., z_K] restricted to the allowed experts: (1 - P(Z = 0), weights).

    All are NaN where a value is NaN or infinite: nothing is decided by such a gate, but not every policy asks it.

    For one expert this is the logistic function of the method's paper (arXiv 2403.03870, section 3).

    Args:
        logits: the gate's value for each expert, [K], in lane order (lane 1 first).
        experts: lanes that may be deferred to, at least one.
    """
    values = [logits[lane - 1] for lane in experts]
    if not all(map(math.isfinite, values)):
        return math.nan, [(lane, math.nan) for lane in experts]
    if len(values) == 1:
        p = probability(values[0])
        return p, [(experts[0], p)]
    top = max(0.0, *values)
    base = math.exp(-top)
    raised = [math.exp(z - top) for z in values]
    total = base + sum(raised)
    return sum(raised) / total, [(lane, e / total) for lane, e in zip(experts, raised, strict=True)]


def _always(position: Position) -> int:
    """Defer every token; the base still looks at each position, so that the gate's values can be studied."""
    return position.favourite


def _never(_position: Position) -> int:
    """Defer nothing; the gate's values are still reported."""
    return BASE


def _threshold(position: Position) -> int:
    """Defer where the gate's deferral probability is greater than the threshold. The method's default."""
    assert position.deferral is not None
    return position.favourite if position.deferral > position.threshold else BASE


def _confidence(position: Position) -> int:
    """Defer where the base is unsure: its top probability is below 1 - threshold. Needs no gate and no training.

    The deferral probability that is reported is then 1 - (the base's top probability), before penalties and
    temperature.
    """
    return _threshold(position)


def _sample(position: Position) -> int:
    """Draw Z from the gate: expert k with probability P(Z = k). The generative model of the method's paper."""
    remaining = position.draw
    for lane, weight in position.weights:
        if remaining < weight:
            return lane
        remaining -= weight
    return BASE


def _random(position: Position) -> int:
    """Defer each token with probability ``rate``: the baseline that a learned gate has to beat at the same rate."""
    return position.favourite if position.draw < position.rate else BASE


POLICIES: dict[PolicyName, Policy] = {
    policy.name: policy
    for policy in (
        Policy("threshold", needs="gate", decide=_threshold, has_threshold=True),
        Policy("sample", needs="gate", decide=_sample, draws=True),
        Policy("always", needs=None, decide=_always),
        Policy("never", needs=None, decide=_never),
        Policy("random", needs=None, decide=_random, draws=True),
        Policy("confidence", needs="top_probability", decide=_confidence, has_threshold=True),
    )
}

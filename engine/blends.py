"""Blends: what is written where the experts are asked, as a combination of the members' distributions.

A policy says where experts are asked; a blend says what is written there. A deferred token without a blend is the
expert's own. With D_i the distribution of member i at a position (temperature 1, nothing applied), z_i its logits and
w_i its weight, the logits that sampling starts from are

* mixture: ``log sum_i w_i D_i``, an average of probabilities (weights are at least 0 and sum to 1);
* product: ``sum_i w_i z_i``, a weighted geometric mean of them (weights of any sign). Proxy tuning (arXiv 2401.08565)
  and contrastive decoding (arXiv 2309.09117) are products, the second with a *plausibility* mask: tokens that the
  anchor finds less probable than that share of its most probable one are ruled out;
* union: with U the ``top`` most probable tokens of each member, ``log sum_i w_i softmax_U(z_i)`` on U (UniTE, arXiv
  2410.03777). Over several vocabularies U has byte strings (:mod:`engine.strategies.unions`), and no other blend is
  defined there.

Everything else of sampling is applied to the combination: grammar, biases, penalties, temperature, top_p, the draw.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from engine.spelling.named import Score

BlendKind = Literal["mixture", "product", "union"]

GREATEST_WEIGHT = 10.0
WEIGHT_SUM_TOLERANCE = 1e-6
GREATEST_TOP = 1024


class Blend(msgspec.Struct, frozen=True, omit_defaults=True):
    """A combination of members. See the module's docstring.

    Attributes:
        weights: (lane, weight), each lane once, in the order of lane numbers. The last lane whose weight is not 0
            writes.
        from_gate: mixtures only: the weights are the gate's probabilities at each position, of the lanes in
            ``weights``, whose numbers there are not looked at.
        anchor: products only: the lane that says what is plausible.
        plausibility: products only: 0 rules nothing out; 1 leaves the anchor's most probable token only.
        top: unions only: how many of each member's most probable tokens may be written.
        score: unions over several vocabularies only: what a member gives to a string that is none of its tokens, see
            :data:`~engine.spelling.named.Score`; None is "mass".
        align: unions over several vocabularies only: members are asked only where all of them have a boundary; None is
            True.
    """

    kind: BlendKind
    weights: tuple[tuple[int, float], ...]
    from_gate: bool = False
    anchor: int = 0
    plausibility: float = 0.0
    top: int = 10
    score: Score | None = None
    align: bool | None = None

    @property
    def lanes(self) -> tuple[int, ...]:
        """Lanes that take part, the writer last."""
        return tuple(lane for lane, _ in self.weights)

    @property
    def writer(self) -> int:
        """The lane that samples the combination."""
        return self.weights[-1][0]

    def effective(self) -> Blend:
        """The same without those that weigh nothing: they need not be computed."""
        if self.from_gate:
            return self
        return msgspec.structs.replace(self, weights=tuple(item for item in self.weights if item[1] != 0))

    @property
    def sole(self) -> int | None:
        """The lane whose own distribution this is; None if it is a combination."""
        if self.from_gate or len(self.weights) != 1 or self.kind == "union":
            return None
        ((lane, weight),) = self.weights
        return lane if weight == 1 and not self.plausibility else None


def problem(blend: Blend, lanes: int, *, has_gate: bool) -> str | None:
    """What is wrong with a blend for a pair of so many lanes; None if it can be computed."""
    numbers = [lane for lane, _ in blend.weights]
    weights = [weight for _, weight in blend.weights]
    if not numbers or numbers != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < lanes:
        return "weights must name members that exist, each once"
    if blend.from_gate:
        if blend.kind != "mixture":
            return f"the gate's weights are for a mixture, not for a {blend.kind}"
        if not has_gate:
            return "the gate's weights need a gate, and none is served"
        if numbers[0] != 0 or len(numbers) < 2:
            return "the gate's weights are those of the base and at least one expert"
    else:
        reason = _problem_of_weights(blend.kind, weights)
        if reason is not None:
            return reason
    masked = blend.plausibility != 0
    if masked and (blend.kind != "product" or not 0 < blend.plausibility <= 1):
        return "plausibility is for a product, greater than 0 and at most 1"
    effective = blend.effective()
    if masked and blend.anchor not in effective.lanes:
        return "the anchor must be a member whose weight is not 0"
    if blend.kind != "union" and (blend.score is not None or blend.align is not None):
        return "score and align are for a union"
    if blend.kind == "union" and not 1 <= blend.top <= GREATEST_TOP:
        return f"top must be from 1 to {GREATEST_TOP}"
    if effective.lanes == (0,) and effective.sole is None:
        return "no expert has a weight"
    return None


def _problem_of_weights(kind: BlendKind, weights: list[float]) -> str | None:
    if any(not math.isfinite(weight) or abs(weight) > GREATEST_WEIGHT for weight in weights):
        return f"weights must be numbers from -{GREATEST_WEIGHT:g} to {GREATEST_WEIGHT:g}"
    if kind == "product":
        return None if any(weights) else "all weights are 0"
    if min(weights) < 0 or abs(math.fsum(weights) - 1) > WEIGHT_SUM_TOLERANCE:
        return f"the weights of a {kind} must be at least 0 and sum to 1"
    return None

"""Deferral with a blend: the policy says where, the blend says what.

A deferred position is passed from member to member. Each lays its distribution on the shelf (the base has done so when
it sampled the draft), and the last one samples the combination. All lanes draw with the same noise, so the draft stands
as often as the combination is near the base's own distribution, and run-ahead is exact as it is without a blend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from engine.blends import Blend, problem
from engine.lanes.interface import LaneRequest, Part, Sample
from engine.sequence import Sequence
from engine.strategies.alone import Alone
from engine.strategies.base import Decision, Decoding, End, Rejected
from engine.strategies.deferral.pacing import Agreement
from engine.strategies.deferral.policies import POLICIES, Policy
from engine.strategies.deferral.strategy import Deferral, DeferralDecoding
from engine.strategies.deferral.window import Draft
from engine.types import BASE, BLEND, ErrorCode, Look, Token

NO_DISTRIBUTION = "a member's logits are not finite, or rule out every token"


class Roles(NamedTuple):
    """Who writes what where in a request.

    Attributes:
        experts: lanes that may be deferred to; none: the base writes alone.
        blend: what is written at deferred positions, without members that weigh nothing; None is the expert's own.
        chain: its lanes in the order in which they speak after the base.
    """

    policy: Policy
    threshold: float
    experts: tuple[int, ...]
    blend: Blend | None = None
    chain: tuple[int, ...] = ()


BASE_ALONE = Roles(POLICIES["never"], 0.0, ())


class Blends:
    """Takes on requests with a blend. Shares everything with deferral; see :class:`~engine.strategies.base.Strategy`.

    Args:
        obstacle: why no blend can be served, for whoever asks for one; None if nothing is in the way.
    """

    def __init__(self, deferral: Deferral, alone: Alone, obstacle: str | None = None) -> None:
        self.counters = deferral.counters
        self._deferral = deferral
        self._alone = alone
        self.obstacle = obstacle

    def begin(self, answer: Sequence) -> Decoding:
        """Take a request on. What is one member's own distribution is not blended: it costs no other member's step.

        Raises:
            Rejected: its blend cannot be computed, or names an expert that the request does not allow.
        """
        roles = self.roles(answer)
        if roles.blend is None and not roles.experts:
            return self._alone.begin(answer)
        window = self._deferral.window_limit(answer)
        if roles.blend is None:
            return DeferralDecoding(answer, self._deferral, roles.policy, roles.threshold, roles.experts, window)
        return BlendDecoding(answer, self._deferral, roles, roles.blend, window)

    def roles(self, answer: Sequence) -> Roles:
        """Who writes what where.

        Raises:
            Rejected: see :meth:`begin`.
        """
        shared = self._deferral
        collaboration = answer.request.collaboration
        asked = collaboration.blend
        assert asked is not None
        reason = self.obstacle or problem(asked, shared.lanes, has_gate=shared.has_gate)
        if reason is None and (asked.score is not None or asked.align is not None):
            reason = "score and align are for members of different vocabularies"
        if reason is None and collaboration.member is not None:
            reason = "a member alone has nobody to be blended with"
        if reason is not None:
            raise Rejected(f"blend: {reason}", field="collaboration.blend")
        blend = asked.effective()
        chain = tuple(lane for lane in blend.lanes if lane != BASE)
        # The base under its negative prompt is no expert.
        experts = tuple(lane for lane in chain if lane < shared.members)
        if not set(experts) <= set(shared.experts(answer)):
            raise Rejected("blend: a member is not among the experts of the request", field="collaboration.blend")
        if not chain:
            return BASE_ALONE
        policy, threshold = shared.rules(answer, experts)
        if not experts and policy.needs == "gate":
            raise Rejected(
                f"blend: the policy {policy.name!r} asks the gate for an expert, and none takes part",
                field="collaboration.blend",
            )
        if len(experts) < len(chain) and chain[-1] not in dict(collaboration.prompts):
            raise Rejected("blend: guidance needs a negative prompt", field="collaboration.blend")
        if blend.sole is not None and experts:
            return Roles(policy, threshold, experts)
        return Roles(policy, threshold, experts, blend, chain)


class BlendDecoding(DeferralDecoding):
    """One request. A draft's ``writer`` is the next member that has to speak at its position."""

    __slots__ = ("blend", "chain", "parts")

    def __init__(
        self, answer: Sequence, shared: Deferral, roles: Roles, blend: Blend, window_limit: int | None
    ) -> None:
        super().__init__(answer, shared, roles.policy, roles.threshold, roles.experts, window_limit)
        self.blend = blend
        self.chain = chain = roles.chain
        if not roles.experts:
            self.uniform_weights = [(chain[0], 1.0)]
        self.parts = {lane: Part(lane, answer.request.request_id, blend) for lane in blend.lanes}

    def open(self, lane: int) -> LaneRequest:
        """With the lane's part in the blend."""
        return super().open(lane)._replace(part=self.parts.get(lane))

    def awaits(self, lane: int, position: int) -> bool:
        """Those that only lay down what they say may do so for several drafts in one visit."""
        if lane in (BASE, self.blend.writer):
            return super().awaits(lane, position)
        index = position - self.prompt_lengths[lane]
        ahead = index - len(self.answer.tokens)
        return 0 <= ahead < len(self.window) and index <= self.known[lane] and self.window[ahead].writer == lane

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """The base has drafted, or the combination is drawn, or a member has laid down what it says."""
        if lane in (BASE, self.blend.writer):
            return super().on_sample(lane, sample, fault)
        ahead = sample.position - self.prompt_lengths[lane] - len(self.answer.tokens)
        following = self.chain[self.chain.index(lane) + 1]
        self.window[ahead].writer = following
        return () if ahead else (self.shared.waits[following],)

    def _decide(self, sample: Sample) -> tuple[int, float | None]:
        if not self.experts:
            sample.gate = None
        writer, deferral = super()._decide(sample)
        return (BASE if writer == BASE else self.chain[0]), deferral

    def _on_expert_sample(self, sample: Sample) -> Iterable[Decision]:
        if sample.support is None or any(map(math.isnan, sample.support)):
            return (End(f"blend: {NO_DISTRIBUTION}", ErrorCode.BAD_READING),)
        return super()._on_expert_sample(sample)

    def _expert_token(self, draft: Draft, sample: Sample) -> Token:
        return Token(sample.token, BLEND, draft.deferral, sample.logprobs, sample.support)

    def _look_of(self, draft: Draft, sample: Sample, *, agreed: bool) -> Look | None:
        # What its last member has read is that member's own distribution, not the combination.
        return Look(draft.confidence, None, agreed) if self.looks else None

    @property
    def agreement(self) -> Agreement:
        """How often the combination's token is the draft."""
        return self.shared.blend_agreement[self.blend.kind]

    def _drafts_on(self) -> bool:
        return self.shared.shelf_has_room() and super()._drafts_on()

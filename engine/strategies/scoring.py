"""Scoring: how probable the joint model finds a given text, token by token (teacher-forced).

What is scored is the distribution that the request would write from at each position, given the text before it:

* without a blend, under a policy that asks the gate: the marginal over the gate, ``sum_k P(Z = k) D_k``, which is what
  the method trains (Co-LLM, arXiv 2403.03870, equation 3);
* without a blend, under another policy: the expert's distribution where the policy defers and the expert does not
  stand back, the base's elsewhere;
* with a blend: the blend's where the policy defers, the base's elsewhere.

The text passes through the lanes in windows. All its tokens but the first are told as if they had been written, and
every lane is asked at the window's positions what it says of the token that stands there. Members of a blend lay
their distributions on the shelf, as they do for a draft. A window's last position is computed once more with the next
window: what a lane knew of it when it computed it was not yet the token after it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from engine.blends import Blend
from engine.lanes.interface import Extension, LaneRequest, Part, Sample
from engine.sequence import Sequence
from engine.strategies.base import LOST, Decision, Decoding, End, Finish, Rejected, Scored
from engine.strategies.deferral.blending import BASE_ALONE, NO_DISTRIBUTION, Blends, Roles
from engine.strategies.deferral.strategy import Deferral, DeferralDecoding
from engine.types import BASE, ErrorCode, SamplingSpec, TokenLogprobs

WINDOW_ELEMENTS = 1 << 24
"""Logits that a lane may have in its hands for the positions of one window: 64 MiB of float32."""

LONGEST_WINDOW = 64

SCORE = "collaboration.score"


def window_of(vocab_size: int) -> int:
    """How many positions are scored at once, with rows of so many logits."""
    return max(1, min(LONGEST_WINDOW, WINDOW_ELEMENTS // vocab_size))


class Scoring:
    """Takes on requests that score their prompt. See :class:`~engine.strategies.base.Strategy`.

    Args:
        window: positions that are scored at once.
        can_cut: whether every lane can take tokens back.
    """

    def __init__(self, deferral: Deferral, blends: Blends, *, window: int, can_cut: bool) -> None:
        self.counters = deferral.counters
        self._window = window
        self._deferral = deferral
        self._blends = blends
        self._can_cut = can_cut

    def begin(self, answer: Sequence) -> Decoding:
        """Take a request on.

        Raises:
            Rejected: what it would write from cannot be computed, or not for a given text.
        """
        shared, collaboration = self._deferral, answer.request.collaboration
        if not self._can_cut:
            raise Rejected(
                "score: the text is scored in windows, and a lane's state cannot be taken back to their ends",
                field=SCORE,
            )
        if collaboration.prompts:
            raise Rejected(
                "prompts: the joint model is scored on one text for all its members; leave prompts out, or take score"
                ' "base"',
                field="collaboration.prompts",
            )
        if collaboration.member is not None:
            raise Rejected("score: a member alone scores its prompt by itself", field=SCORE)
        if len(answer.request.prompt) < 2:
            raise Rejected("score: a text of one token has nothing before it that could predict it", field=SCORE)
        if not 0 < answer.request.score_from < len(answer.request.prompt):
            raise Rejected("score: the first token that is scored is not one of the text's, or has nothing before it")
        if collaboration.blend is not None:
            roles = self._blends.roles(answer)
        else:
            experts = shared.experts(answer)
            roles = Roles(*shared.rules(answer, experts), experts) if experts else BASE_ALONE
            if roles.policy.needs == "gate":
                if self._blends.obstacle is not None:
                    raise Rejected(f"score: {self._blends.obstacle}", field=SCORE)
                lanes = sorted(experts)
                marginal = Blend("mixture", tuple((lane, 0.0) for lane in (BASE, *lanes)), from_gate=True)
                roles = roles._replace(blend=marginal, chain=tuple(lanes))
        if collaboration.veto and roles.blend is not None:
            raise Rejected(
                "veto: where several members are averaged, and the marginal over the gate is such an average, none of"
                " them stands back",
                field="collaboration.veto",
            )
        return ScoringDecoding(answer, shared, roles, everywhere=collaboration.blend is None, longest=self._window)


class ScoringDecoding(DeferralDecoding):
    """One text. Nothing is written: tokens are the text's own, and the answer stays empty.

    Args:
        roles: what is written where.
        everywhere: a blend is scored at all positions, whatever the policy says.
        longest: positions of a window.

    Attributes:
        text: what is scored.
        first: the first position that is scored: what is before it is the lanes' prompt.
        entries: by position, from there on, as far as the base has spoken; at deferred positions of the window its own,
            until who would have written there has spoken.
        begin: the window's first position.
        end: behind its last one.
        writers: who would write at each of its positions, as far as the base has spoken.
        turn: the lane that speaks.
        pending: positions of which it has not spoken yet.
        queue: lanes that speak after it in this window, and their positions.
    """

    __slots__ = (
        "begin",
        "end",
        "entries",
        "everywhere",
        "first",
        "longest",
        "pending",
        "queue",
        "roles",
        "text",
        "turn",
        "writers",
    )

    def __init__(self, answer: Sequence, shared: Deferral, roles: Roles, *, everywhere: bool, longest: int) -> None:
        super().__init__(answer, shared, roles.policy, roles.threshold, roles.experts, 0)
        self.roles = roles
        if roles.blend is not None:
            self.veto = 0.0
        self.everywhere = everywhere
        self.longest = longest
        self.text = answer.request.prompt
        self.first = answer.request.score_from
        self.prompts = [self.text[: self.first]] * shared.lanes
        self.prompt_lengths = [self.first] * shared.lanes
        self.entries: list[TokenLogprobs] = []
        self.end = self.first
        self.queue: deque[tuple[int, list[int]]] = deque()
        self._open_window()

    def _open_window(self) -> None:
        self.begin, self.end = self.end, min(self.end + self.longest, len(self.text))
        self.writers: list[int] = []
        self._give_the_floor(BASE, range(self.begin, self.end))

    def _give_the_floor(self, lane: int, positions: Iterable[int]) -> None:
        self.turn = lane
        self.pending = deque(positions)

    # -- lanes ------------------------------------------------------------------------------------------------

    def needs(self, lane: int) -> bool:
        """The one whose turn it is."""
        return lane == self.turn

    def expected_gain(self) -> float:
        """Nothing is written."""
        return 0.0

    def awaits(self, lane: int, position: int) -> bool:
        """Positions come in order. What the lane draws behind all that it was told is of no use."""
        return lane == self.turn and bool(self.pending) and position == self.pending[0] < self.first + self.known[lane]

    def sampling(self, lane: int) -> SamplingSpec:
        """Nothing is drawn that anybody looks at."""
        asked = self.answer.request.sampling
        return SamplingSpec(temperature=0.0, logprobs=asked.prompt_logprobs or 0, cache_salt=asked.cache_salt)

    def open(self, lane: int) -> LaneRequest:
        """The text as far as the window goes."""
        self.known[lane] = self.end - self.first
        return LaneRequest(
            self.answer.request.request_id,
            self.prompts[lane],
            self.text[self.first : self.end],
            self.sampling(lane),
            final=self._final,
            asked=tuple(self.pending),
            wants_top_probability=self.wants_top_probability(lane),
            part=self._part(lane),
            scores=True,
        )

    def extend(self, lane: int) -> Extension:
        """The window's text, from the token before its first position on, see the module."""
        keep = min(self.known[lane], self.pending[0] - 1 - self.first)
        self.known[lane] = self.end - self.first
        tokens = self.text[self.first + keep : self.end]
        return Extension(self.answer.request.request_id, keep, tokens, self._final, tuple(self.pending))

    @property
    def _final(self) -> int:
        # The next window takes one token back.
        return self.end - 1 - self.first

    def _part(self, lane: int) -> Part | None:
        blend = self.roles.blend
        if blend is None or lane not in blend.lanes:
            return None
        return Part(lane, self.answer.request.request_id, blend)

    # -- samples ----------------------------------------------------------------------------------------------

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """The base has spoken of the window's next position, or who writes at the next deferred one has."""
        if fault is not None:
            return (fault,)
        position = self.pending.popleft()
        assert sample.logprobs is not None
        if lane == BASE:
            writer, _, fault = self._look(sample, None)
            if fault is not None:
                return (fault,)
            self.writers.append(writer)
            self.entries.append(sample.logprobs)
        elif self.roles.blend is None or lane == self.roles.blend.writer:
            if sample.support is not None and any(map(math.isnan, sample.support)):
                return (End(f"score: {NO_DISTRIBUTION}", ErrorCode.BAD_READING),)
            try:
                if not self._stands_back(sample):
                    self.entries[position - self.first] = sample.logprobs
            except ValueError as error:
                return (End(str(error), ErrorCode.BAD_READING),)
        return () if self.pending else self._on_turn_over(lane)

    def on_lane_lost(self, lane: int) -> Iterable[Decision]:
        """A part of the text would stay without its score."""
        self.shared.counters.expert_failures += 1
        return (LOST,)

    def _decide(self, sample: Sample) -> tuple[int, float | None]:
        if self.roles.blend is not None and self.everywhere:
            return self.roles.chain[0], None
        return super()._decide(sample) if self.experts else (BASE, None)

    @property
    def may_defer(self) -> bool:
        """Limits are for what is written."""
        return True

    def _on_turn_over(self, lane: int) -> Iterable[Decision]:
        if lane == BASE:
            self._queue_up()
        if self.queue:
            self._give_the_floor(*self.queue.popleft())
            return (self.shared.waits[self.turn],)
        if self.end == len(self.text):
            return (Scored(self.entries), Finish("length"))
        self._open_window()
        return (self.shared.asks[BASE],)

    def _queue_up(self) -> None:
        """Those that speak after the base: all members of a blend, or each expert of its own positions."""
        deferred: dict[int, list[int]] = {}
        for position, writer in enumerate(self.writers, self.begin):
            if writer != BASE:
                deferred.setdefault(BASE if self.roles.blend is not None else writer, []).append(position)
        if self.roles.blend is None:
            self.queue.extend(deferred.items())
        elif deferred:
            self.queue.extend((lane, deferred[BASE]) for lane in self.roles.chain)

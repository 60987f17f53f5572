"""Deferral: the base looks at every position, a policy decides who writes there (Co-LLM, arXiv 2403.03870).

*Run-ahead*: while a position waits for its expert, the base may draft on as if its own token stood there. The expert
then decides every deferred position of such a window in one visit; the first token that differs from its draft ends
the window. Every lane samples a position with the same noise (see :mod:`engine.draws`), so what is written is, token
for token, what would have been written without: greedy or sampled. That is speculative decoding (Leviathan et al.,
2023) with common random numbers in place of rejection sampling, and only deferred positions can reject.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec

from engine import draws
from engine.blends import BlendKind
from engine.lanes.interface import Extension, LaneRequest, Sample
from engine.sequence import Sequence
from engine.strategies.base import LOST, Ask, Counters, Decision, End, Rejected, SharedText, Wait
from engine.strategies.deferral.pacing import Agreement
from engine.strategies.deferral.policies import NOT_FINITE, POLICIES, Policy, Position, read_gate
from engine.strategies.deferral.window import LONGEST_WINDOW, Draft, window_limit
from engine.types import BASE, Collaboration, ErrorCode, Look, PolicyName, RunAhead, SamplingSpec, Token

CONFIDENCE_THRESHOLD = 0.5
"""Default threshold of the ``confidence`` policy; a gate artifact's threshold is on another scale."""


class Deferral:
    """What all requests of the strategy share. See :class:`~engine.strategies.base.Strategy`.

    Args:
        lanes: number of lanes.
        members: how many of them are members; 0 is the base, the others are experts.
        has_gate: whether the base lane's samples carry gate values.
        policy: for requests that name none.
        threshold: for requests that name none.
        expert_failure: what becomes of a deferral whose expert is lost: "error" ends the request, "base" lets the
            base's own token stand.
        run_ahead: for requests that do not say: "auto", "off", or how many tokens the base may draft past a deferral.
        drafting: whether anybody may draft at all; a lane may be unable to take tokens back.
        draft_pays: whether a draft that stands with this probability pays; asked where run-ahead is "auto".
        shelf_has_room: whether members of blends may lay down more than the next position needs.
        veto: for requests that name none, see :class:`~engine.types.Collaboration`.

    Attributes:
        agreement: per lane, how often it writes what the base drafted.
        blend_agreement: per kind of blend, how often what the base drafted is drawn.
    """

    def __init__(
        self,
        *,
        lanes: int,
        members: int,
        counters: Counters,
        has_gate: bool,
        policy: PolicyName = "threshold",
        threshold: float = 0.5,
        expert_failure: Literal["error", "base"] = "error",
        run_ahead: RunAhead = "off",
        drafting: bool = True,
        draft_pays: Callable[[float], bool] = lambda probability: probability >= 0.5,
        shelf_has_room: Callable[[], bool] = lambda: True,
        veto: float = 0.0,
    ) -> None:
        self.veto = veto
        self.lanes = lanes
        self.members = members
        self.counters = counters
        self.expert_failure = expert_failure
        self.draft_pays = draft_pays
        self.agreement = [Agreement() for _ in range(lanes)]
        self.blend_agreement: defaultdict[BlendKind, Agreement] = defaultdict(Agreement)
        self.shelf_has_room = shelf_has_room
        # One object each: decisions are made for every token.
        self.asks = [Ask(lane) for lane in range(lanes)]
        self.waits = [Wait(lane) for lane in range(lanes)]
        self.has_gate = has_gate
        self._policy: PolicyName = policy
        self.thresholds: dict[PolicyName, float] = {
            name: CONFIDENCE_THRESHOLD if name == "confidence" else threshold
            for name, each in POLICIES.items()
            if each.has_threshold and (has_gate or each.needs != "gate")
        }
        """The default threshold of each policy that has one and can be used."""
        self._run_ahead: RunAhead = run_ahead
        self._drafting = drafting

    def begin(self, answer: Sequence) -> DeferralDecoding:
        """Take a request on; see :class:`~engine.types.Collaboration` for what it may ask for. No blend is looked at.

        Raises:
            Rejected: it names an expert that does not exist, or a policy that needs a gate where there is none.
        """
        experts = self.experts(answer)
        return DeferralDecoding(answer, self, *self.rules(answer, experts), experts, self.window_limit(answer))

    def rules(self, answer: Sequence, experts: tuple[int, ...]) -> tuple[Policy, float]:
        """The policy and the threshold of a request.

        Raises:
            Rejected: an expert does not exist, or a policy needs a gate where there is none.
        """
        collaboration = answer.request.collaboration
        policy = POLICIES[collaboration.policy or self._policy]
        if any(not 0 < lane < self.members for lane in experts):
            raise Rejected("experts names a lane that does not exist", field="collaboration.experts")
        if policy.needs == "gate" and not self.has_gate:
            raise Rejected(f"policy {policy.name!r} needs a gate, and none is served", field="collaboration.policy")
        threshold = collaboration.threshold
        if threshold is None:
            threshold = self.thresholds.get(policy.name, 0.0)
        return policy, threshold

    def window_limit(self, answer: Sequence) -> int | None:
        """See :func:`~engine.strategies.deferral.window.window_limit`."""
        return window_limit(answer.request, self._run_ahead) if self._drafting else 0

    def experts(self, answer: Sequence) -> tuple[int, ...]:
        """Lanes that may be deferred to, each once."""
        experts = answer.request.collaboration.experts
        return tuple(range(1, self.members)) if experts is None else tuple(dict.fromkeys(experts))


class DeferralDecoding(SharedText):
    """One request.

    Beyond the written tokens there may be a *window* of drafts. It begins with a deferred position; until its expert
    has decided that one, all after it is a guess.

    Attributes:
        window: drafts, in order; the first one is deferred.
        experts: lanes that may be deferred to.
        expert_tokens: how many of the written tokens are experts'.
        expert_limit: the request's max_expert_tokens.
        rate: the request's, for the policies that have one.
        looks: whether the request asks how sure the models are.
        decided: what lanes are told is written. Here that is what is written; a subclass may hold some of it back.
        draws: the request's series of policy draws, see :func:`engine.draws.series`.
        uniform_weights: (lane, probability) of each expert where there is no gate to tell.
        veto: an expert that is less sure than this stands back. Whether it does follows from the text before alone, not
            from what was drawn: the base's token stands there as it was drawn, with the base's own probability.
    """

    __slots__ = (
        "decided",
        "draws",
        "expert_limit",
        "expert_tokens",
        "experts",
        "looks",
        "policy",
        "rate",
        "shared",
        "threshold",
        "uniform_weights",
        "veto",
        "window",
        "window_limit",
    )

    def __init__(
        self,
        answer: Sequence,
        shared: Deferral,
        policy: Policy,
        threshold: float,
        experts: tuple[int, ...],
        window_limit: int | None,
    ) -> None:
        super().__init__(answer, BASE, shared.lanes)
        self.shared = shared
        self.policy = policy
        self.threshold = threshold
        self.experts = experts
        collaboration = answer.request.collaboration
        self.expert_limit = collaboration.max_expert_tokens
        self.rate = collaboration.rate
        self.window_limit = window_limit
        self.fixed_window = window_limit is not None
        self.draws = draws.series(answer.seed, draws.POLICY_STREAM)
        self.uniform_weights = [(lane, 1.0 / len(experts)) for lane in experts]
        self.decided = answer.tokens
        self.window: list[Draft] = []
        self.expert_tokens = 0
        self.looks = collaboration.looks
        # Where several members write together, nobody's token stands back.
        own = collaboration.veto
        self.veto = 0.0 if collaboration.blend is not None else shared.veto if own is None else own

    def in_force(self) -> Collaboration:
        """The policy, the experts, and the threshold where the policy has one."""
        return msgspec.structs.replace(
            self.answer.request.collaboration,
            policy=self.policy.name,
            threshold=self.threshold if self.policy.has_threshold else None,
            experts=self.experts,
            veto=self.veto,
        )

    # -- lanes ------------------------------------------------------------------------------------------------

    @property
    def writer(self) -> int:
        """The lane that writes the next token."""
        return self.window[0].writer if self.window else BASE

    @property
    def deferred(self) -> int:
        """How many drafts wait for an expert's word."""
        return sum(draft.writer != BASE for draft in self.window)

    def awaits(self, lane: int, position: int) -> bool:
        """The base is awaited behind the drafts, an expert at the first of them."""
        index = position - self.prompt_lengths[lane]
        written = len(self.decided)
        if lane == self.primary_lane:
            # Told of more or of less: the sample is an aborted namesake's, or follows drafts that have been cut.
            return index == written + len(self.window) == self.known[lane]
        return index == written <= self.known[lane] and lane == self.writer

    def sampling(self, lane: int) -> SamplingSpec:
        """With one seed for all lanes where drafts are wanted: else a draft agrees with its expert only by chance."""
        sampling = super().sampling(lane)
        if sampling.seed is None and sampling.temperature > 0 and self.window_limit != 0:
            sampling = msgspec.structs.replace(sampling, seed=self.answer.seed)
        return sampling

    def open(self, lane: int) -> LaneRequest:
        """With the drafts, as far as the lane has to know them."""
        end, probes = self._extent(lane)
        self.known[lane] = end
        request = self.answer.request
        return LaneRequest(
            request.request_id,
            self.prompts[lane],
            self._between(0, end),
            self.sampling(lane),
            final=len(self.answer.tokens),
            asked=probes,
            wants_top_probability=self.wants_top_probability(lane),
            draw_offset=self.answer.prompt_length - self.prompt_lengths[lane],
        )

    def wants_top_probability(self, lane: int) -> bool:
        """The base for the policy, an expert for its veto."""
        needed = self.policy.needs == "top_probability" if lane == BASE else self.veto > 0
        return needed or super().wants_top_probability(lane)

    def extend(self, lane: int) -> Extension | None:
        """With the drafts, as far as the lane has to know them."""
        tokens = self.decided
        known, end = self.known[lane], len(tokens)
        probes: tuple[int, ...] = ()
        if self.window:
            end, probes = self._extent(lane)
        if known >= end:
            return None
        self.known[lane] = end
        added = self._between(known, end) if self.window else tokens[known:]
        return Extension(self.answer.request.request_id, known, added, len(self.answer.tokens), probes)

    def _extent(self, lane: int) -> tuple[int, tuple[int, ...]]:
        """How many tokens, drafts included, a lane should be told, and at which positions before the end it samples.

        An expert is told as much as it needs to decide its deferred positions, as far as no other expert comes
        first; the base everything.
        """
        if lane == self.primary_lane:
            return len(self.decided) + len(self.window), ()
        probes = []
        begin = self.prompt_lengths[lane] + len(self.decided)
        for index, draft in enumerate(self.window):
            if draft.writer == lane:
                probes.append(begin + index)
            elif draft.writer != BASE:
                break
        *before, last = probes
        return last - self.prompt_lengths[lane], tuple(before)

    def _between(self, begin: int, end: int) -> list[int]:
        """Tokens, written ones then drafts, from index ``begin`` up to but without ``end``."""
        tokens = self.decided
        written = len(tokens)
        if end <= written:
            return tokens[begin:end]
        drafts = [draft.token for draft in self.window[max(begin - written, 0) : end - written]]
        return tokens[begin:] + drafts

    # -- samples ----------------------------------------------------------------------------------------------

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """The base has sampled the position after all drafts: decide who writes there. Or an expert has decided."""
        if lane != self.primary_lane:
            return self._on_expert_sample(sample)
        writer, deferral, fault = self._look(sample, fault)
        if not self.window and writer == BASE and fault is None:
            # Nobody questions it: by far the most tokens never are drafts.
            look = Look(sample.top_probability) if self.looks else None
            return (Token(sample.token, BASE, deferral, sample.logprobs, look=look), self.shared.asks[BASE])
        self.window.append(
            Draft(sample.token, writer, deferral, sample.logprobs, fault, sample.top_probability, sample.regret)
        )
        if writer != BASE and len(self.window) == 1:
            shared = self.shared
            return (shared.waits[writer], shared.asks[BASE]) if self._drafts_on() else (shared.waits[writer],)
        return self._on_draft()

    def _on_draft(self) -> Iterator[Decision]:
        """The window has grown by one."""
        writer = self.window[-1].writer
        if len(self.window) == 1:
            yield from self._commit_drafts()
        elif writer == self.writer:
            yield self.shared.asks[writer]
        if self.window and self._drafts_on():
            yield self.shared.asks[BASE]

    def _look(self, sample: Sample, fault: End | None) -> tuple[int, float | None, End | None]:
        """The writer of the position that the base has sampled, the deferral probability there, and what is wrong."""
        if fault is None:
            try:
                return *self._decide(sample), None
            except ValueError as error:
                self.shared.counters.gate_errors += 1
                fault = End(str(error), ErrorCode.BAD_READING)
        return BASE, None, fault

    def _decide(self, sample: Sample) -> tuple[int, float | None]:
        """The lane that writes the sampled position, and the deferral probability there."""
        policy = self.policy
        deferral: float | None
        if sample.gate is not None:
            deferral, weights = read_gate(sample.gate, self.experts)
            if math.isnan(deferral):
                if policy.needs == "gate":
                    raise ValueError(NOT_FINITE)
                deferral = None
        else:
            deferral, weights = None, self.uniform_weights
        if policy.needs == "top_probability":
            assert sample.top_probability is not None
            if not 0.0 <= sample.top_probability <= 1.0:
                raise ValueError("the base's top probability is not finite")
            deferral = 1.0 - sample.top_probability
        if self.expert_limit is not None and not self.may_defer:
            return BASE, deferral
        draw = draws.uniform_in(self.draws, sample.position) if policy.draws else 0.0
        return policy.decide(Position(deferral, weights, self.threshold, self.rate, draw)), deferral

    @property
    def may_defer(self) -> bool:
        """Whether an expert may write the token after the drafts at all."""
        return self.expert_limit is None or self.expert_tokens + self.deferred < self.expert_limit

    def _on_expert_sample(self, sample: Sample) -> Iterable[Decision]:
        """The expert has decided the next position."""
        counters = self.shared.counters
        draft = self.window[0]
        agreed = draft.token == sample.token
        token = self._expert_token(draft, sample)
        try:
            if self._stands_back(sample):
                token = self._own_token(draft, vetoed=True)
        except ValueError as error:
            return (End(str(error), ErrorCode.BAD_READING),)
        look = self._look_of(draft, sample, agreed=agreed)
        if look is not None:
            token.look = look
        stands = agreed or token.vetoed
        self.agreement.observe(stands)
        if token.vetoed:
            counters.vetoed += 1
        else:
            counters.agreements += agreed
            self.expert_tokens += 1
        if stands:
            self._pop()
        else:
            counters.runahead_discarded += len(self.window) - 1
            self._cut()
        if self.window:
            return self._write_and_commit(token)
        if self.known[BASE] > len(self.decided):
            return (token,)  # the base is already looking at the next position
        return (token, self.shared.asks[BASE])

    def _stands_back(self, sample: Sample) -> bool:
        """Whether an expert is not sure enough of what it says.

        Raises:
            ValueError: it does not say how sure it is.
        """
        if self.veto == 0:
            return False
        assert sample.top_probability is not None
        if not 0.0 <= sample.top_probability <= 1.0:
            raise ValueError("the expert's top probability is not finite")
        return sample.top_probability < self.veto

    def _expert_token(self, draft: Draft, sample: Sample) -> Token:
        """What the lane that has the word writes in a draft's place."""
        return Token(sample.token, draft.writer, draft.deferral, sample.logprobs)

    def _own_token(self, draft: Draft, *, vetoed: bool = False) -> Token:
        """The base's own, which stands."""
        look = Look(draft.confidence) if self.looks else None
        return Token(draft.token, BASE, draft.deferral, draft.logprobs, look=look, vetoed=vetoed)

    def _look_of(self, draft: Draft, sample: Sample, *, agreed: bool) -> Look | None:
        """What is told of a position at which others than the base have spoken, if that is asked for."""
        if not self.looks:
            return None
        return Look(draft.confidence, sample.top_probability, agreed)

    @property
    def agreement(self) -> Agreement:
        """How often what stands for the first draft is the draft."""
        return self.shared.agreement[self.writer]

    def _write_and_commit(self, token: Token) -> Iterator[Decision]:
        yield token
        yield from self._commit_drafts()

    def on_lane_lost(self, lane: int) -> Iterable[Decision]:
        """The next position was deferred to this lane: as ``expert_failure`` says."""
        self.shared.counters.expert_failures += 1
        if self.shared.expert_failure == "error":
            yield LOST
            return
        yield from self._write_and_commit(self._own_token(self._pop()))

    # -- the window -------------------------------------------------------------------------------------------

    def expected_gain(self) -> float:
        """Probability that the token after the drafts will stand: that every expert asked before it agrees."""
        if not self.window:
            return 1.0
        return self.agreement.rate**self.deferred

    def _drafts_on(self) -> bool:
        """Whether the base should look at the token after the drafts before the expert has spoken."""
        limit, last, answer = self.window_limit, self.window[-1], self.answer
        if limit == 0 or last.writer not in (BASE, self.writer) or last.fault is not None:
            return False
        ahead = len(self.window)
        if (
            # All of a window's positions are sampled as ones at which the text may end.
            len(self.decided) < answer.request.sampling.min_tokens
            or len(self.decided) + ahead >= answer.max_output
            or last.token in answer.stop_token_ids
            or self._hangs_on_a_veto
        ):
            return False
        if limit is not None:
            return ahead <= limit
        return ahead < LONGEST_WINDOW and self.shared.draft_pays(self.expected_gain())

    @property
    def _hangs_on_a_veto(self) -> bool:
        """Whether an expert may write the token after the drafts if one of those asked before it stands back."""
        return self.veto > 0 and self.deferred > 0 and not self.may_defer

    def _commit_drafts(self) -> Iterator[Decision]:
        """Write the drafts that nobody questions any more, up to the next one that waits for an expert."""
        while self.window and self.window[0].writer == BASE:
            draft = self._pop()
            if draft.fault is not None:
                yield draft.fault
                return
            yield self._own_token(draft)
        if self.window:
            yield self.shared.waits[self.window[0].writer]
        elif self.known[BASE] < len(self.decided):
            yield self.shared.asks[BASE]
        # Else the base is already looking at the next position.

    def _pop(self) -> Draft:
        """Take the first draft, which stands; those after it have stood the test so far."""
        draft = self.window.pop(0)
        if self.window:
            self.shared.counters.runahead_accepted += 1
        return draft

    def _cut(self) -> None:
        """Forget all drafts: the next token is another than the first of them. Lanes that were told are cut too."""
        self.window.clear()
        written = len(self.decided)
        self.known = [min(known, written) for known in self.known]

    def on_end(self) -> None:
        """What is left of the window was in vain."""
        self.shared.counters.runahead_discarded += max(0, len(self.window) - 1)
        self.window.clear()

"""Deferral that may take an expert's token back after reading on: regret.

Where an expert has written something else than the base would have, the text goes on, but from there it is held back.
Once the base has read some tokens on, it says how much it regrets the expert's (:mod:`engine.hindsight`). If that is
more than the request allows, the text is cut back to there, and the base's own token, as it was drawn, stands in its
place; else the expert's stands for good. Positions are settled in order and each once, so each is cut at most once, and
nothing that anybody was told is ever taken back. What is held back is no lane's to share: it is not ``final``.

Where the text ends before so much is read, the base looks back from the last position.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import msgspec

from engine.hindsight import NEVER, Hindsight, numbers_of
from engine.lanes.interface import Sample
from engine.sequence import Sequence
from engine.strategies.base import Decision, End, Rejected
from engine.strategies.deferral.policies import Policy
from engine.strategies.deferral.strategy import Deferral, DeferralDecoding
from engine.strategies.deferral.window import Draft
from engine.types import BASE, Collaboration, ErrorCode, Token

FIELD = "collaboration.regret"


class Backtracking:
    """Deferral, of requests that may want tokens taken back.

    Args:
        hindsight: None if no regret artifact is served.
        regret: for requests that name none.
        can_cut: whether all lanes can take tokens back.
    """

    def __init__(self, deferral: Deferral, hindsight: Hindsight | None, regret: float, *, can_cut: bool) -> None:
        self._deferral = deferral
        self._hindsight = hindsight
        self._regret = regret
        self._can_cut = can_cut

    def begin(self, answer: Sequence) -> DeferralDecoding:
        """Take a request on. Where it is the engine's default that cannot be had, the request goes without.

        Raises:
            Rejected: as :meth:`~engine.strategies.deferral.strategy.Deferral.begin`; or it asks for what cannot be had.
        """
        asked = answer.request.collaboration.regret
        regret = self._regret if asked is None else asked
        if regret >= NEVER:
            return self._deferral.begin(answer)
        obstacle = self._obstacle(answer)
        if obstacle is not None or self._hindsight is None:
            if asked is not None:
                raise Rejected(f"regret: {obstacle}", field=FIELD)
            return self._deferral.begin(answer)
        shared, experts = self._deferral, self._deferral.experts(answer)
        policy, threshold = shared.rules(answer, experts)
        window = shared.window_limit(answer)
        return BacktrackingDecoding(answer, shared, policy, threshold, experts, window, self._hindsight, regret)

    def _obstacle(self, answer: Sequence) -> str | None:
        if self._hindsight is None:
            return "the served gate has no regret artifact (regret.json); leave it out, or train one"
        if not self._can_cut:
            return "a member cannot take tokens back; leave it out"
        if answer.request.sampling.structured_outputs is not None:
            return "an answer of a given form cannot be taken back; leave out one of both"
        return None


class _Held(NamedTuple):
    """A position of the text that is held back, or that what follows hangs on.

    Attributes:
        draft: the base's own token there, and what its step said.
        expert: the expert's top probability; None where the base writes.
    """

    token: Token
    draft: Draft
    expert: float | None


class BacktrackingDecoding(DeferralDecoding):
    """One request. Its text is what the lanes are told; its answer, the beginning of that, is what nobody questions.

    Attributes:
        held: the text behind the answer.
        disputed: indices in the text of experts' tokens that are still to be looked back at.
        regret: what is regretted more is taken back.
    """

    __slots__ = ("_next", "disputed", "held", "hindsight", "regret")

    def __init__(
        self,
        answer: Sequence,
        shared: Deferral,
        policy: Policy,
        threshold: float,
        experts: tuple[int, ...],
        window_limit: int | None,
        hindsight: Hindsight,
        regret: float,
    ) -> None:
        super().__init__(answer, shared, policy, threshold, experts, window_limit)
        self.hindsight = hindsight
        self.regret = regret
        self.decided: list[int] = []
        self.held: list[_Held] = []
        self.disputed: list[int] = []
        self._next: tuple[Draft, float | None] | None = None
        """Of the token that is decided next: see :class:`_Held`."""

    def in_force(self) -> Collaboration:
        """With the regret."""
        return msgspec.structs.replace(super().in_force(), regret=self.regret)

    def wants_top_probability(self, lane: int) -> bool:
        """All: a regret goes by how sure each was."""
        return True

    # -- decisions --------------------------------------------------------------------------------------------

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterator[Decision]:
        """As deferral decides, but held back where it may be regretted."""
        if lane == self.primary_lane and not self.window:
            row = Draft(sample.token, BASE, None, sample.logprobs, None, sample.top_probability, sample.regret)
            if self._is_due:
                stands = yield from self._look_back(row, len(self.decided))
                if not stands:
                    return
                yield from self._release(self._settled)
            # Should nobody question the token, it never is a draft.
            self._next = row, None
        yield from self._hold(super().on_sample(lane, sample, fault))

    def on_lane_lost(self, lane: int) -> Iterator[Decision]:
        """As deferral decides."""
        yield from self._hold(super().on_lane_lost(lane))

    def _expert_token(self, draft: Draft, sample: Sample) -> Token:
        self._next = draft, sample.top_probability
        return super()._expert_token(draft, sample)

    def _own_token(self, draft: Draft, *, vetoed: bool = False) -> Token:
        self._next = draft, None
        return super()._own_token(draft, vetoed=vetoed)

    def _hold(self, decisions: Iterable[Decision]) -> Iterator[Decision]:
        """The decisions of deferral; of its tokens those that nobody questions any more."""
        for decision in decisions:
            if type(decision) is End:
                yield from self._release(len(self.decided))
            if type(decision) is not Token:
                yield decision
                continue
            assert self._next is not None
            ends = self._append(_Held(decision, *self._next))
            while self.disputed and (ends or (self.window and self._is_due)):
                last, row = self._from_the_end if ends else (len(self.decided), self.window[0])
                stands = yield from self._look_back(row, last)
                if not stands:
                    return
            yield from self._release(self._settled)

    def _append(self, held: _Held) -> bool:
        """Write one token on; whether it ends the text."""
        token, answer, index = held.token, self.answer, len(self.decided)
        self.decided.append(token.id)
        self.held.append(held)
        # A lane lets a text end once it is long enough, and must not be cut back to where it is not.
        if token.credit != BASE and token.id != held.draft.token and index >= answer.min_tokens:
            self.disputed.append(index)
        return index + 1 >= answer.max_output or (token.id in answer.stop_token_ids and index + 1 >= answer.min_tokens)

    # -- looking back -----------------------------------------------------------------------------------------

    @property
    def _first(self) -> int:
        """Index in the text of the first token that is held."""
        return len(self.decided) - len(self.held)

    @property
    def _settled(self) -> int:
        """How much of the text nobody questions any more."""
        return self.disputed[0] if self.disputed else len(self.decided)

    @property
    def _is_due(self) -> bool:
        """Whether enough is written to look back at the first disputed token, from the position behind the text."""
        return bool(self.disputed) and self.disputed[0] + self.hindsight.ahead == len(self.decided)

    @property
    def _from_the_end(self) -> tuple[int, Draft]:
        """Where the text ends: whence to look back at the first disputed token, and the base's step there."""
        last = min(self.disputed[0] + self.hindsight.ahead, len(self.decided) - 1)
        return last, self.held[last - self._first].draft

    def _look_back(self, row: Draft, last: int) -> Generator[Decision, None, bool]:
        """Look at the first disputed token, from the base's step at index ``last``; whether it stands.

        If not, it is taken back, and the request goes on from there.
        """
        index, first = self.disputed[0], self._first
        held = self.held[index - first]
        between = [each.expert for each in self.held[index - first + 1 : last - first] if each.expert is not None]
        assert held.draft.confidence is not None
        assert held.expert is not None
        assert row.confidence is not None
        assert row.regret is not None
        numbers = numbers_of(held.draft.confidence, held.expert, row.confidence, between)
        regret = self.hindsight.regret(row.regret, numbers)
        if math.isnan(regret):
            self.shared.counters.gate_errors += 1
            yield from self._release(len(self.decided))
            yield End("the regret's value is not finite", ErrorCode.BAD_READING)
            return False
        if regret <= self.regret:
            del self.disputed[0]
            return True
        yield from self._take_back(index)
        return False

    def _take_back(self, index: int) -> Iterator[Decision]:
        """Cut the text back to ``index``, and let the base's own token stand there."""
        counters, behind = self.shared.counters, self.held[index - self._first :]
        counters.regretted += 1
        counters.revoked += len(behind)
        counters.runahead_discarded += max(0, len(self.window) - 1)
        self.expert_tokens -= sum(each.token.credit != BASE for each in behind)
        del self.held[-len(behind) :]
        del self.decided[index:]
        self.disputed.clear()
        self._cut()
        regretted, draft, _ = behind[0]
        own = Token(draft.token, BASE, regretted.deferral, draft.logprobs, look=regretted.look, regretted=True)
        self._append(_Held(own, draft, None))
        yield from self._release(len(self.decided))
        yield self.shared.asks[BASE]

    def _release(self, end: int) -> Iterator[Decision]:
        """Write the text up to but without index ``end``."""
        while self._first < end:
            yield self.held.pop(0).token

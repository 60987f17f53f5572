"""Strategies: ways to write text with several lanes. How to add one is in ``README.md`` beside this file."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from engine.hindsight import NEVER, Hindsight
from engine.lanes.shelf import Shelf
from engine.sequence import Sequence
from engine.spelling.speller import Speller
from engine.strategies.alone import Alone
from engine.strategies.base import Counters, Decoding, Rejected
from engine.strategies.characters import Characters
from engine.strategies.deferral import Deferral
from engine.strategies.deferral.backtracking import FIELD as REGRET
from engine.strategies.deferral.backtracking import Backtracking
from engine.strategies.deferral.blending import Blends
from engine.strategies.scoring import LONGEST_WINDOW, SCORE, Scoring
from engine.strategies.unions import Unions
from engine.strategies.words import Words
from engine.types import BASE, Collaboration, StrategyName


class Strategies:
    """Gives every request to the strategy that it asks for.

    Args:
        members: number of members; 0 is the base, the others are experts.
        guidance: there is one lane more, for the base under negative prompts.
        blend_obstacle: why no blend can be served; None if nothing is in the way.
        spellers: of each member's vocabulary, None for an expert that has the base's; empty if all have one.
        contexts: of each member, in tokens; with ``spellers``.
        end: the base's token that ends a text, if it has one; with ``spellers``.
        score_window: positions that are scored at once, see :func:`~engine.strategies.scoring.window_of`.
        words_obstacle: why experts cannot write words; None if nothing is in the way.
        shelf: where lanes lay down their distributions; with ``spellers``.
        characters: None where members' tokens are not known as bytes.
        hindsight: how the base looks back at experts' tokens; None if it cannot.
        regret: for requests that name none.
        deferral: further arguments of :class:`~engine.strategies.deferral.Deferral`.

    Attributes:
        counters: what they count, all together.
        served: what the joint model can be asked for; the first is the default.
    """

    def __init__(
        self,
        members: int,
        *,
        guidance: bool = False,
        blend_obstacle: str | None = None,
        spellers: Seq[Speller | None] = (),
        contexts: Seq[int] = (),
        end: int | None = None,
        drafting: bool = True,
        score_window: int = LONGEST_WINDOW,
        words_obstacle: str | None = None,
        shelf: Shelf | None = None,
        characters: Characters | None = None,
        hindsight: Hindsight | None = None,
        regret: float = NEVER,
        **deferral: Any,
    ) -> None:
        self.counters = Counters()
        lanes = members + guidance
        self.alone = Alone(lanes)
        self.deferral = Deferral(lanes=lanes, members=members, counters=self.counters, drafting=drafting, **deferral)
        self.backtracking = Backtracking(self.deferral, hindsight, regret, can_cut=drafting)
        self.blends = Blends(self.deferral, self.alone, blend_obstacle)
        self.words = Words(self.deferral, spellers, contexts, end, words_obstacle)
        self.unions = (
            Unions(
                self.deferral, self.alone, spellers, contexts, end, shelf or Shelf(), blend_obstacle or words_obstacle
            )
            if spellers
            else None
        )
        self.scoring = Scoring(self.deferral, self.blends, window=score_window, can_cut=drafting)
        self._characters = characters
        self._lanes = lanes
        self._members = members
        self.served: list[StrategyName] = ["deferral"]
        if members > 1 and characters is not None and characters.obstacle is None:
            self.served.append("characters")

    def begin(self, answer: Sequence) -> Decoding:
        """Take a request on.

        Raises:
            Rejected: it cannot be served as it asks to be.
        """
        member = answer.request.collaboration.member
        if member is not None and not 0 <= member < self._members:
            raise Rejected(f"member {member} does not exist")
        for lane, _ in answer.request.collaboration.prompts:
            if member is not None or not BASE < lane < self._lanes:
                raise Rejected("prompts are for the experts of the joint model", field="collaboration.prompts")
        by_characters = (
            member is None and self._members > 1 and self._strategy(answer.request.collaboration) == "characters"
        )
        spelled = self.words.concerns(self.deferral.experts(answer))
        by_words = member is None and spelled
        _check_second_looks(answer, together=by_characters, by_words=by_words)
        if answer.request.scores:
            if spelled:
                raise Rejected("score: a text cannot be scored by members with vocabularies of their own", field=SCORE)
            return self.scoring.begin(answer)
        if by_characters:
            if self._characters is None:
                raise Rejected("characters: the members' tokens are not known as bytes", field="collaboration.strategy")
            return self._characters.begin(answer)
        if answer.request.collaboration.blend is not None:
            return (self.unions or self.blends).begin(answer)
        if member is not None or not self.deferral.experts(answer):
            return self.alone.begin(answer)
        if by_words:
            return self.words.begin(answer)
        return self.backtracking.begin(answer)

    def _strategy(self, collaboration: Collaboration) -> StrategyName:
        return collaboration.strategy or self.served[0]


def _check_second_looks(answer: Sequence, *, together: bool, by_words: bool) -> None:
    """Refuse a veto or a regret where no expert's own token is written that could stand back or be taken back.

    Args:
        together: the members write together, whatever blend is asked for.
        by_words: an expert has a vocabulary of its own.
    """
    collaboration = answer.request.collaboration
    together = together or collaboration.blend is not None
    if collaboration.veto and together:
        raise Rejected(
            "veto: an expert's own token may stand back for the base's; here members write together",
            field="collaboration.veto",
        )
    if collaboration.regret is None or collaboration.regret >= NEVER:
        return
    reason = None
    if together:
        reason = "an expert's own token may be taken back; here members write together"
    elif answer.request.scores:
        reason = "a text that is scored is given, and nothing of it is taken back"
    elif by_words:
        reason = "an expert with a vocabulary of its own writes words, which are not taken back"
    if reason is not None:
        raise Rejected(f"regret: {reason}; leave it out", field=REGRET)


__all__ = ["Counters", "Decoding", "Rejected", "Strategies"]

"""One lane writes everything: a member alone, or the base where no expert is allowed. The smallest strategy."""

from __future__ import annotations

from collections.abc import Iterable

from engine.lanes.interface import Sample
from engine.sequence import Sequence
from engine.strategies.base import LOST, Ask, Counters, Decision, End, SharedText
from engine.types import BASE, Look, Token


class Alone:
    """Every sample of the request's own lane is written. See :class:`~engine.strategies.base.Strategy`."""

    def __init__(self, lanes: int) -> None:
        self.counters = Counters()
        self._lanes = lanes
        self._asks = [Ask(lane) for lane in range(lanes)]

    def begin(self, answer: Sequence) -> AloneDecoding:
        """Any request can be served."""
        lane = answer.request.collaboration.member or BASE
        return AloneDecoding(answer, lane, self._lanes, self._asks[lane])


class AloneDecoding(SharedText):
    """See :class:`~engine.strategies.base.Decoding`."""

    __slots__ = ("_ask",)

    def __init__(self, answer: Sequence, lane: int, lanes: int, ask: Ask) -> None:
        super().__init__(answer, lane, lanes)
        self._ask = ask

    def awaits(self, lane: int, position: int) -> bool:
        """The next position, by the one lane, if it has been told all before it."""
        index = position - self.prompt_lengths[lane]
        return lane == self.primary_lane and index == len(self.answer.tokens) == self.known[lane]

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """It stands."""
        if fault is not None:
            return (fault,)
        return (Token(sample.token, lane, None, sample.logprobs, look=self._look(sample)), self._ask)

    def _look(self, sample: Sample) -> Look | None:
        if not self.answer.request.collaboration.looks:
            return None
        return Look(sample.top_probability) if self.primary_lane == BASE else Look(None, sample.top_probability)

    def on_lane_lost(self, lane: int) -> Iterable[Decision]:
        """There is nobody else."""
        return (LOST,)

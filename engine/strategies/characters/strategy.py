"""Characters: several members write one text byte by byte, each in tokens of its own.

CharED (Gu, Chen and Wang, arXiv 2407.11009) over bytes. Every round all members are asked for their next-token
distribution after the common text. Symbols (a byte, the end of the piece, the end of the text) are drawn from the
average of the members' until the piece ends; the piece is appended, and each member follows it in its own tokens. The
drawing is in :mod:`engine.spelling.chorus`; here the lanes are asked and told.

Distributions come over the shelf, sorted and summed up in the lane's worker. What vLLM samples beside is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import msgspec

from engine import draws
from engine.lanes.interface import Extension, LaneRequest, Part, Sample
from engine.lanes.shelf import Shelf
from engine.sequence import Sequence as Answer
from engine.spelling.chorus import Chorus
from engine.spelling.mass import Mass
from engine.spelling.speller import Speller, SpellingError
from engine.spelling.strand import Strand
from engine.strategies.base import LOST, Ask, Counters, Decision, Decoding, End, Finish, Rejected
from engine.strategies.characters.requests import members, problem
from engine.types import NO_TOKEN, Collaboration, ErrorCode, SamplingSpec, Token

NO_DISTRIBUTION = "a member's logits are not finite, or rule out every token"

_BEHIND = 64
"""Bytes by which what a lane may share with other requests lags behind what it could."""


class Characters:
    """What all requests of the strategy share. See :class:`~engine.strategies.base.Strategy`.

    Args:
        spellers: of each member's vocabulary, the base's first; None where there is none that can spell every text.
        contexts: most tokens of each member's prompt and output together.
        shelf: where the lanes lay down their distributions.
        obstacle: why nothing can be written like this, if anything is in the way.
    """

    def __init__(
        self,
        spellers: Sequence[Speller | None],
        contexts: Sequence[int],
        shelf: Shelf,
        *,
        obstacle: str | None = None,
    ) -> None:
        self.counters = Counters()
        self.contexts = contexts
        self.shelf = shelf
        self.spellers = [speller for speller in spellers if speller is not None]
        if obstacle is None and (not spellers or len(self.spellers) < len(spellers)):
            obstacle = "a member's tokens are no byte strings, or cannot spell every text"
        self.obstacle = obstacle

    def begin(self, answer: Answer) -> CharactersDecoding:
        """Take a request on.

        Raises:
            Rejected: it asks for what only tokens can give, or its weights are none.
        """
        request = answer.request
        reason = self.obstacle or problem(request)
        if reason is not None:
            raise Rejected(f"characters: {reason}")
        try:
            weights = members(request.collaboration.weights, len(self.spellers))
        except ValueError as error:
            raise Rejected(f"characters: {error}") from None
        return CharactersDecoding(answer, self, weights)


class CharactersDecoding(Decoding):
    """One request. A round: all members are asked, and when the last one has spoken a piece is written.

    Attributes:
        lanes: of the members that take part.
        chorus: draws the pieces.
        strands: by lane, the text in the member's tokens; the chorus appends to them.
        masses: by lane, what it said after the tokens that it holds.
        unheard: lanes that are asked and have not spoken.
        told: those of them that know what they are asked; what others sample is of the round before.
    """

    __slots__ = (
        "_finals", "_prompts", "_shared", "_weights", "chorus", "lanes", "masses", "strands", "told", "unheard",
    )  # fmt: skip

    def __init__(self, answer: Answer, shared: Characters, weights: list[tuple[int, float]]) -> None:
        super().__init__(answer, weights[0][0])
        request = answer.request
        sampling = request.sampling
        # Pieces are no tokens: none of them ends the text by being one.
        answer.stop_token_ids = frozenset()
        self.lanes = [lane for lane, _ in weights]
        self._shared = shared
        self._weights = tuple(weights)
        self._prompts = {lane: request.prompt_of(lane) for lane in self.lanes}
        self._finals = dict.fromkeys(self.lanes, 0)
        self.chorus = Chorus(
            [shared.spellers[lane] for lane in self.lanes],
            [weight for _, weight in weights],
            kind=request.collaboration.average,
            temperature=sampling.temperature,
            draw=partial(draws.uniform_in, draws.series(answer.seed, draws.SYMBOL_STREAM)),
            min_pieces=sampling.min_tokens,
            ignore_end=sampling.ignore_eos,
        )
        self.strands = dict(zip(self.lanes, self.chorus.strands, strict=True))
        self.masses: dict[int, Mass] = {}
        self.unheard = set(self.lanes)
        self.told: set[int] = set()

    def in_force(self) -> Collaboration:
        """With the weights of those that take part."""
        asked = super().in_force()
        return msgspec.structs.replace(asked, strategy="characters", weights=self._weights)

    def on_admitted(self) -> Iterable[Decision]:
        """All members read their prompts at once."""
        return map(Ask, self.lanes)

    def awaits(self, lane: int, position: int) -> bool:
        """After all the tokens that the lane was told, once."""
        return lane in self.told and position == len(self._prompts[lane]) + len(self.strands[lane].tokens)

    def open(self, lane: int) -> LaneRequest:
        """The member's own prompt, and the text in its tokens."""
        strand = self.strands[lane]
        strand.tell()
        self.told.add(lane)
        request_id = self.answer.request.request_id
        return LaneRequest(
            request_id,
            self._prompts[lane],
            list(strand.tokens),
            SamplingSpec(temperature=0.0, cache_salt=self.answer.request.sampling.cache_salt),
            self._final(lane, strand),
            part=Part(lane, request_id, None),
        )

    def extend(self, lane: int) -> Extension | None:
        """What the text's last piece changed in the member's tokens."""
        strand = self.strands[lane]
        keep, tokens = strand.plan()
        if not tokens:
            return None
        strand.tell()
        self.told.add(lane)
        assert keep >= self._finals[lane], "a token that was final is spelled anew"
        return Extension(self.answer.request.request_id, keep, tokens, self._final(lane, strand))

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """A member has laid down its distribution; the last one lets the next piece be drawn."""
        if fault is not None:
            return (fault,)
        offer = self._shared.shelf.take(lane, sample.request_id, sample.position - len(self._prompts[lane]))
        if offer is None or offer.row is None:
            return (End(f"characters: {NO_DISTRIBUTION}", ErrorCode.BAD_READING),)
        self.masses[lane] = offer.row
        self.unheard.remove(lane)
        self.told.remove(lane)
        return () if self.unheard else self._write()

    def on_lane_lost(self, lane: int) -> Iterable[Decision]:
        """Nobody goes on without a member."""
        return (LOST,)

    def _write(self) -> Iterator[Decision]:
        chorus = self.chorus
        try:
            piece = chorus.write([self.masses[lane] for lane in self.lanes])
        except SpellingError as error:
            yield End(f"characters: {error}", ErrorCode.LANE_FAILURE)
            return
        if piece.ended:
            yield Finish("stop")
            return
        support = [float("nan") if heard is None else heard for heard in piece.support]
        yield Token(NO_TOKEN, self.lanes[piece.source], support=support, text=piece.text)
        for lane, strand in zip(self.lanes, chorus.strands, strict=True):
            if strand.pending:
                yield End(f"characters: a member cannot spell {strand.pending!r}", ErrorCode.LANE_FAILURE)
            elif len(self._prompts[lane]) + len(strand.tokens) >= self._shared.contexts[lane]:
                yield Finish("length")
        self.unheard.update(self.lanes)
        yield from map(Ask, self.lanes)

    def _final(self, lane: int, strand: Strand) -> int:
        """How many tokens of the lane can no longer be cut; behind by up to _BEHIND bytes, since to look takes time."""
        final = self._finals[lane]
        if not final or len(strand.text) - strand.ends[final - 1] >= _BEHIND:
            final = self._finals[lane] = max(final, strand.settled())
        return final

"""Unions where base and experts have different vocabularies: UniTE, with SAFE's checks.

The answer is base tokens. The policy looks at every position of the base's. Where it asks, the members' most probable
*strings* are put together, each member gives each of them a probability, and the most probable one by their weighted
average is written (UniTE, arXiv 2410.03777; :mod:`engine.spelling.union`); with a temperature one is drawn. Taken at
every position of a long answer this ruins the answer, so the base's own token stands (SAFE, arXiv 2510.15346)

* where an expert's tokens have no boundary: it would have to go on from a beginning that it has not seen in training;
* and, greedy, where all members agree with it anyway, or give it more than half of the probability.

The base drafts ahead (``run_ahead``), and an expert looks at all drafts in one step: SAFE's verification. An expert
reads drafts in its own tokens. A draft that would change the expert's tokens before a position which is still open
waits until that position is written, so that what is written does not depend on drafts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from engine import draws
from engine.blends import Blend, problem
from engine.lanes.interface import Extension, LaneRequest, Part, Sample
from engine.lanes.shelf import DEFAULT_BYTES, Shelf
from engine.sequence import Sequence as Answer
from engine.spelling.mass import Mass
from engine.spelling.speller import Speller, SpellingError
from engine.spelling.union import Rule, agreed, pick, scores_of, union
from engine.spelling.words import inside_character
from engine.strategies.alone import Alone
from engine.strategies.base import Decision, Decoding, End, Rejected
from engine.strategies.deferral import Deferral
from engine.strategies.deferral.pacing import Agreement
from engine.strategies.deferral.policies import Policy
from engine.strategies.deferral.strategy import DeferralDecoding
from engine.strategies.deferral.window import Draft
from engine.strategies.unions.reader import Reader
from engine.types import BASE, BLEND, Collaboration, ErrorCode, SamplingSpec, Token

NO_DISTRIBUTION = "a member's logits are not finite, or rule out every token"

_REFUSED = {
    "logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "structured_outputs": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Sampling parameters that are about tokens, which a string of another vocabulary is not; their defaults."""


class Unions:
    """What all requests of the strategy share. See :class:`~engine.strategies.base.Strategy`.

    Args:
        deferral: whose experts, policies, and counters are used.
        alone: for blends of the base alone.
        spellers: of each member; None for an expert that shares the base's vocabulary.
        contexts: of each member's lane, in tokens.
        end: the base's token that ends a text; None if it has none, and no expert can end one.
        shelf: where the lanes lay down their distributions.
        obstacle: why nothing can be written like this; None if nothing is in the way.

    Attributes:
        room: bytes of distributions that may wait for their experts before requests stop drafting ahead.
    """

    def __init__(
        self,
        deferral: Deferral,
        alone: Alone,
        spellers: Sequence[Speller | None],
        contexts: Sequence[int],
        end: int | None,
        shelf: Shelf,
        obstacle: str | None = None,
    ) -> None:
        self.counters = deferral.counters
        self.deferral = deferral
        self.spellers = [speller or spellers[BASE] for speller in spellers]
        self.contexts = contexts
        self.end = end
        self.shelf = shelf
        self.room = DEFAULT_BYTES
        self._alone = alone
        self._obstacle = obstacle

    def begin(self, answer: Answer) -> Decoding:
        """Take a request on.

        Raises:
            Rejected: its blend is no union, or it asks for what strings cannot give.
        """
        shared, collaboration = self.deferral, answer.request.collaboration
        blend = collaboration.blend
        assert blend is not None
        reason = self._obstacle
        if reason is None and blend.kind != "union":
            reason = f"a {blend.kind} needs one vocabulary, and the members' differ: only a union can be written"
        if reason is None:
            reason = problem(blend, len(self.spellers), has_gate=shared.has_gate)
        if reason is None and collaboration.member is not None:
            reason = "a member alone has nobody to be blended with"
        if reason is None:
            for field, default in _REFUSED.items():
                if getattr(answer.request.sampling, field) not in (default, {}):
                    reason = f"{field}: cannot be served by members of different vocabularies"
                    break
        if reason is not None:
            raise Rejected(f"blend: {reason}", field="collaboration.blend")
        blend = blend.effective()
        chain = tuple(lane for lane in blend.lanes if lane != BASE)
        if not set(chain) <= set(shared.experts(answer)):
            raise Rejected("blend: a member is not among the experts of the request", field="collaboration.blend")
        if not chain:
            return self._alone.begin(answer)
        return UnionsDecoding(answer, self, blend, chain, *shared.rules(answer, chain))


class _Position(Draft, gc=False):
    """A draft, and what is needed to decide it.

    Attributes:
        string: the draft's bytes, b"" for the end of the text.
        mass: the base's distribution, if it weighs something.
        places: by lane how many of its tokens its distribution follows.
        unaligned: the policy asked, and an expert could not speak there.
    """

    string: bytes = b""
    mass: Mass | None = None
    places: dict[int, int] = msgspec.field(default_factory=dict)
    unaligned: bool = False


class _Stalled(NamedTuple):
    """The base's sample behind the window, which cannot be looked at yet."""

    sample: Sample
    position: _Position


class UnionsDecoding(DeferralDecoding):
    """One request.

    Attributes:
        text: the bytes of what is written.
        readers: of the experts that take part, by lane.
        window: as in deferral; the first draft is one that experts are asked about.
        stalled: behind it; None if the base may go on.
        held: bytes of the distributions that wait for others.
    """

    __slots__ = ("blend", "chain", "held", "readers", "rule", "stalled", "text", "uniform", "unions")

    window: list[Draft]

    def __init__(
        self, answer: Answer, unions: Unions, blend: Blend, chain: tuple[int, ...], policy: Policy, threshold: float
    ) -> None:
        # What is drawn has no noise in common with the base's draft, which would agree with it by chance only.
        greedy = answer.request.sampling.temperature == 0
        limit = unions.deferral.window_limit(answer) if greedy else 0
        super().__init__(answer, unions.deferral, policy, threshold, chain, limit)
        self.unions = unions
        self.blend = blend
        self.chain = chain
        self.text = bytearray()
        self.readers = {
            lane: Reader(self._speller(lane), self.prompt_lengths[lane], unions.contexts[lane]) for lane in chain
        }
        self.stalled: _Stalled | None = None
        self.held = 0
        sampling = answer.request.sampling
        self.rule = Rule(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        self.uniform = partial(draws.uniform_in, draws.series(answer.seed, draws.SYMBOL_STREAM))

    def in_force(self) -> Collaboration:
        """With the blend's own defaults."""
        score = self.blend.score or "mass"
        align = self.blend.align is not False
        blend = msgspec.structs.replace(self.blend, score=score, align=align)
        return msgspec.structs.replace(super().in_force(), blend=blend)

    def _speller(self, lane: int) -> Speller:
        speller = self.unions.spellers[lane]
        assert speller is not None
        return speller

    # -- lanes ------------------------------------------------------------------------------------------------

    def awaits(self, lane: int, position: int) -> bool:
        """The base behind the drafts; an expert wherever it owes a distribution."""
        reader = self.readers.get(lane)
        if reader is not None:
            return position - reader.prompt_length in reader.owed
        return self.stalled is None and super().awaits(lane, position)

    def open(self, lane: int) -> LaneRequest:
        """The base's with the drafts, or the text and the drafts in an expert's own tokens."""
        reader = self.readers.get(lane)
        request_id = self.answer.request.request_id
        part = Part(lane, request_id, None)
        if reader is None:
            speaks = BASE in self.blend.lanes
            return super().open(lane)._replace(part=part if speaks else None)
        _, _, asked = self._tell(lane, reader)
        return LaneRequest(
            request_id,
            self.prompts[lane],
            list(reader.strand.tokens),
            SamplingSpec(temperature=0.0, cache_salt=self.answer.request.sampling.cache_salt),
            reader.final,
            asked=asked,
            part=part,
        )

    def extend(self, lane: int) -> Extension | None:
        """What the lane has to know, to speak wherever it is asked."""
        reader = self.readers.get(lane)
        if reader is None:
            return super().extend(lane)
        if not reader.strand.plan()[1]:
            return None
        keep, tokens, asked = self._tell(lane, reader)
        return Extension(self.answer.request.request_id, keep, tokens, reader.final, asked)

    def _tell(self, lane: int, reader: Reader) -> tuple[int, list[int], tuple[int, ...]]:
        """Tokens kept, tokens that follow, and the positions before the end that are asked for."""
        keep, tokens = reader.strand.plan()
        assert keep >= reader.told_final, "a token that was final is spelled anew"
        reader.strand.tell()
        reader.told_final = reader.final
        places = {place for place in self._asked(lane) if place not in reader.masses}
        reader.owed = places | {reader.place}
        return keep, tokens, tuple(reader.prompt_length + place for place in sorted(places - {reader.place}))

    def _asked(self, lane: int) -> Iterator[int]:
        """Places at which the window needs the lane's distribution, in order."""
        return (draft.places[lane] for draft in self._positions if draft.writer != BASE)

    @property
    def _positions(self) -> list[_Position]:
        return self.window  # type: ignore[return-value]

    # -- samples ----------------------------------------------------------------------------------------------

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """The base has sampled the position after all drafts. Or an expert has laid down what it says."""
        reader = self.readers.get(lane)
        if reader is not None:
            return self._on_distribution(lane, reader, sample)
        offer = self.unions.shelf.take(BASE, sample.request_id, sample.position - self.prompt_lengths[BASE])
        writer, deferral, fault = self._look(sample, fault)
        position = _Position(sample.token, writer, deferral, fault=fault, mass=offer.row if offer else None)
        return self._place(sample, position)

    def _place(self, sample: Sample, position: _Position) -> Iterable[Decision]:
        """Take a position into the window, or write it if there is none and nobody is asked."""
        if position.writer != BASE:
            string = self._string(position.token)
            if string is None:
                position.writer = BASE
            elif not self._follow():
                self.stalled = _Stalled(sample, position)
                return ()
            elif not self._all_can_speak(string):
                position.writer, position.unaligned = BASE, True
            else:
                position.string = string
                position.places = {lane: reader.place for lane, reader in self.readers.items()}
        if position.writer == BASE:
            position.mass = None
            if not self.window and position.fault is None:
                return self._write_own(position)
        self.window.append(position)
        return self._on_position(position)

    def _write_own(self, position: _Position) -> Iterator[Decision]:
        yield self._written(position)
        yield self.shared.asks[BASE]

    def _on_position(self, position: _Position) -> Iterator[Decision]:
        """The window has grown by one."""
        if position.mass is not None:
            position.mass = position.mass.copy()
        self._count_held()
        if position.writer != BASE:
            for lane in self.chain:
                if self._heard(lane, position) is None:
                    yield self.shared.asks[lane]
        if len(self.window) == 1:
            yield from self._commit()
        elif self._drafts_on():
            yield self.shared.asks[BASE]

    def _string(self, token: int) -> bytes | None:
        """A draft as a string that members can give a probability; None if it is none."""
        vocabulary = self._speller(BASE).vocabulary
        if token in vocabulary.stops:
            return None if self.answer.request.sampling.ignore_eos else b""
        return vocabulary.bytes_of(token)

    def _drafted(self) -> bytes:
        """What is written, and the drafts."""
        vocabulary = self._speller(BASE).vocabulary
        return bytes(self.text) + vocabulary.text_of(draft.token for draft in self.window)

    def _follow(self) -> bool:
        """Let all experts read the drafts; False if one of them would change its mind about an open position."""
        text = self._drafted()
        return all(reader.follow(text, self._asked(lane)) for lane, reader in self.readers.items())

    def _all_can_speak(self, upcoming: bytes) -> bool:
        align = self.blend.align is not False
        some = next(iter(self.readers.values())).strand.text
        if align and inside_character(some):
            return False
        return all(reader.can_speak(upcoming, align=align) for reader in self.readers.values())

    def _on_distribution(self, lane: int, reader: Reader, sample: Sample) -> Iterator[Decision]:
        place = sample.position - reader.prompt_length
        reader.owed.remove(place)
        offer = self.unions.shelf.take(lane, sample.request_id, place)
        if place in self._asked(lane):
            if offer is None or offer.row is None:
                yield End(f"blend: {NO_DISTRIBUTION}", ErrorCode.BAD_READING)
                return
            reader.masses[place] = offer.row.copy()
            self._count_held()
        if self.answer.waits_for is None:
            yield from self._commit()
        if self.window and any(at not in reader.masses and at not in reader.owed for at in self._asked(lane)):
            yield self.shared.asks[lane]

    # -- decisions --------------------------------------------------------------------------------------------

    def _commit(self) -> Iterator[Decision]:
        """Write what is decided, up to the next position that waits for an expert."""
        while self.window:
            position = self._positions[0]
            if position.writer == BASE:
                self._pop()
                if position.fault is not None:
                    yield position.fault
                    return
                yield self._written(position)
                continue
            lacking = next((lane for lane in self.chain if self._heard(lane, position) is None), None)
            if lacking is not None:
                yield self.shared.waits[lacking]
                break
            try:
                tokens = self._decide_position(position)
            except ValueError as error:
                yield End(f"blend: {error}", ErrorCode.BAD_READING)
                return
            yield from tokens
        if self.window:
            if self._drafts_on():
                yield self.shared.asks[BASE]
            return
        stalled, self.stalled = self.stalled, None
        if stalled is not None:
            yield from self._place(*stalled)
        elif self.known[BASE] < len(self.answer.tokens):
            yield self.shared.asks[BASE]

    def _heard(self, lane: int, position: _Position) -> Mass | None:
        return self.readers[lane].masses.get(position.places[lane])

    def _decide_position(self, position: _Position) -> list[Token]:
        """What is written at the first position of the window, which is taken out, or cut if that is no draft.

        Raises:
            ValueError: a member has no distribution.
        """
        masses = [position.mass if lane == BASE else self._heard(lane, position) for lane in self.blend.lanes]
        said = [mass for mass in masses if mass is not None]
        if len(said) < len(masses):
            raise ValueError(NO_DISTRIBUTION)
        weights = [weight for _, weight in self.blend.weights]
        tokens = [Token(position.token, BASE, position.deferral)]
        if self.rule.temperature or not agreed(position.string, said, weights):
            tokens = self._average(position, said, weights) or tokens
        stands = len(tokens) == 1 and tokens[0].id == position.token
        self.agreement.observe(stands)
        self.shared.counters.agreements += stands
        if stands:
            self._pop()
        else:
            self.shared.counters.runahead_discarded += len(self.window) - 1
            self._cut()
        self.expert_tokens += len(tokens)
        self.text += self._speller(BASE).vocabulary.text_of(token.id for token in tokens)
        self._settle(position)
        return tokens

    def _average(self, position: _Position, masses: list[Mass], weights: list[float]) -> list[Token]:
        """The base tokens of the string that the members' average writes; none if it cannot be written."""
        answer = self.answer
        spellers = [self._speller(lane) for lane in self.blend.lanes]
        score = self.blend.score or "mass"
        joint = union(spellers, masses, weights, top=self.blend.top, score=score)
        if answer.request.sampling.ignore_eos or len(answer.tokens) < answer.min_tokens or self.unions.end is None:
            joint.pop(b"", None)
        if not any(joint.values()):
            return []
        string = pick(joint, self.rule, self.uniform(len(answer.tokens)))
        ids = self._tokens(position, string)
        support = [
            math.log(chance) if chance else -math.inf for chance in scores_of(spellers, masses, string, score=score)
        ]
        first = [Token(token, BLEND, position.deferral, support=support) for token in ids[:1]]
        return first + [Token(token, BLEND) for token in ids[1:]]

    def _tokens(self, position: _Position, string: bytes) -> list[int]:
        """A string in base tokens, up to where the request ends or its experts have written enough."""
        answer = self.answer
        if string == position.string:
            return [position.token]
        if not string:
            assert self.unions.end is not None
            return [self.unions.end]
        speller = self._speller(BASE)
        own = position.mass.likeliest(string) if position.mass else next(iter(speller.vocabulary.exact(string)), None)
        try:
            tokens = speller.spell(string) if own is None else [own]
        except SpellingError:
            return []  # bytes that are no text
        before = len(answer.tokens)
        limit = answer.request.collaboration.max_expert_tokens
        most = answer.max_output - before
        tokens = tokens[: most if limit is None else min(most, limit - self.expert_tokens)]
        for count, token in enumerate(tokens, 1):
            if token in answer.stop_token_ids and before + count >= answer.min_tokens:
                return tokens[:count]
        return tokens

    def _written(self, position: _Position) -> Token:
        """The base's own token."""
        self.text += self._speller(BASE).vocabulary.bytes_of(position.token) or b""
        self.shared.counters.unaligned_deferrals += position.unaligned
        self._settle(position)
        return Token(position.token, BASE, position.deferral)

    def on_lane_lost(self, lane: int) -> Iterable[Decision]:
        """The next position was deferred to this lane: as ``expert_failure`` says."""
        if self.shared.expert_failure == "error":
            return super().on_lane_lost(lane)
        self.shared.counters.expert_failures += 1
        self.window[0].writer = BASE
        return self._commit()

    @property
    def agreement(self) -> Agreement:
        """How often the average writes the draft."""
        return self.shared.blend_agreement["union"]

    # -- the window -------------------------------------------------------------------------------------------

    def _drafts_on(self) -> bool:
        return self.stalled is None and self.unions.room > 0 and super()._drafts_on()

    def _settle(self, position: _Position) -> None:
        """A position is written: what was needed for it is no more."""
        for lane, reader in self.readers.items():
            reader.settle(len(self.text), position.places.get(lane, 0))
        self._count_held()

    def _count_held(self) -> None:
        held = sum(reader.nbytes for reader in self.readers.values())
        held += sum(position.mass.nbytes for position in self._positions if position.mass is not None)
        self.unions.room += self.held - held
        self.held = held

    def _cut(self) -> None:
        """Forget all drafts; the text goes on from what is written."""
        self.stalled = None
        super()._cut()
        for reader in self.readers.values():
            reader.rewind(len(self.text))

    def on_end(self) -> None:
        """What is left of the window was in vain."""
        super().on_end()
        self.stalled = None
        self.readers.clear()
        self._count_held()

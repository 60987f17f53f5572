"""Deferral where base and experts have different vocabularies: the experts write whole words.

The answer is base tokens, as ever. The policy looks at every position of the base's; where it defers to an expert of
another vocabulary, that expert is asked only if a word begins there for both of them, or behind a word of its own.
Inside a word that others began it would have to go on from a beginning that it has not seen in training, which ruins
what it writes (the first check of SAFE, arXiv 2510.15346); there the base's token stands. The expert then writes token
after token until the next one would begin another word. The word is spelled in base tokens behind what is written, so
that no written token ever changes.

Each lane keeps its own tokens of the common text: own tokens stay as they were sampled, foreign text is spelled anew
from the last boundary that is safe (:mod:`engine.spelling.strand`). An expert's sample that closed its word stays good
until the text goes on, and begins its next word if that comes at once.

The vocabularies have no noise in common and words are not verified, so the base does not run ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from engine.lanes.interface import Extension, LaneRequest, Sample
from engine.sequence import Sequence as Answer
from engine.spelling.speller import Speller, SpellingError
from engine.spelling.words import Word, begins_word, inside_character
from engine.strategies.base import LOST, Decision, End, Rejected, SharedText
from engine.strategies.deferral import Deferral
from engine.strategies.deferral.policies import Policy
from engine.strategies.deferral.strategy import DeferralDecoding
from engine.strategies.words.side import Side
from engine.types import BASE, ErrorCode, Look, SamplingSpec, Token

_LOOK_BACK = 8
"""Bytes of the text that tell whether a word begins after them."""

_REFUSED = {
    "logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "structured_outputs": None,
}
"""Sampling parameters that name tokens, or ask for what one vocabulary cannot say of another's word; their defaults."""


class Words:
    """What all requests of the strategy share. See :class:`~engine.strategies.base.Strategy`.

    Args:
        deferral: whose experts, policies, and counters are used.
        spellers: of each member; None for an expert that shares the base's vocabulary, which writes single tokens.
        contexts: of each member's lane, in tokens.
        end: the base's token that ends a text; None if it has none, and no expert can end one.
        obstacle: why members cannot write words, for whoever asks for it; None if nothing is in the way.
    """

    def __init__(
        self,
        deferral: Deferral,
        spellers: Sequence[Speller | None],
        contexts: Sequence[int],
        end: int | None,
        obstacle: str | None = None,
    ) -> None:
        self._obstacle = obstacle
        self.counters = deferral.counters
        self.deferral = deferral
        self.spellers = spellers
        self.contexts = contexts
        self.end = end

    def concerns(self, experts: Iterable[int]) -> bool:
        """Whether any of these experts has another vocabulary than the base."""
        return any(0 < lane < len(self.spellers) and self.spellers[lane] is not None for lane in experts)

    def begin(self, answer: Answer) -> WordsDecoding:
        """Take a request on.

        Raises:
            Rejected: it asks for what only members of one vocabulary can do, or for what deferral cannot serve either.
        """
        if self._obstacle is not None:
            raise Rejected(f"members of different vocabularies: {self._obstacle}")
        sampling = answer.request.sampling
        for field, default in _REFUSED.items():
            if getattr(sampling, field) != default:
                raise Rejected(f"{field}: cannot be served by members of different vocabularies", field=field)
        experts = self.deferral.experts(answer)
        return WordsDecoding(answer, self, *self.deferral.rules(answer, experts), experts)


class _Question(NamedTuple):
    """A position that was deferred.

    Attributes:
        writer: the expert that has the word.
        token: what the base would write.
        word: as far as the expert has written it; None if it shares the base's vocabulary.
        logprobs: of the expert's tokens so far.
        confidence: the base's top probability; None if it was not read.
        confidences: of the expert's tokens so far, where they are read.
    """

    writer: int
    token: int
    deferral: float | None
    word: Word | None
    logprobs: list[float]
    confidence: float | None
    confidences: list[float]

    def look(self, *, agreed: bool | None = None) -> Look:
        """How sure base and expert were."""
        return Look(self.confidence, min(self.confidences, default=None), agreed)


class WordsDecoding(DeferralDecoding):
    """One request.

    Attributes:
        text: the bytes of what is written.
        last_writer: the lane that wrote the last token.
        question: what an expert is being asked; None while the base writes.
        sides: of the experts with other vocabularies, by lane.
    """

    __slots__ = ("last_writer", "question", "sides", "text", "words")

    def __init__(
        self, answer: Answer, words: Words, policy: Policy, threshold: float, experts: tuple[int, ...]
    ) -> None:
        super().__init__(answer, words.deferral, policy, threshold, experts, window_limit=0)
        self.words = words
        self.text = bytearray()
        self.last_writer = BASE
        self.question: _Question | None = None
        self.sides = {
            lane: Side(speller, self.prompt_lengths[lane], words.contexts[lane])
            for lane in experts
            if (speller := words.spellers[lane]) is not None
        }

    @property
    def _base(self) -> Speller:
        speller = self.words.spellers[BASE]
        assert speller is not None
        return speller

    # -- lanes ------------------------------------------------------------------------------------------------

    def awaits(self, lane: int, position: int) -> bool:
        """The base while nobody is asked; an expert whenever it owes a sample, which may be used later."""
        side = self.sides.get(lane)
        if side is not None:
            return side.awaits(position)
        asked = BASE if self.question is None else self.question.writer
        index = position - self.prompt_lengths[lane]
        return lane == asked and index == len(self.answer.tokens) == self.known[lane]

    def sampling(self, lane: int) -> SamplingSpec:
        """Of an expert with another vocabulary: without what counts or names the base's tokens."""
        sampling = super().sampling(lane)
        if lane not in self.sides:
            return sampling
        # Its own end of text is looked at where it comes; the log-probability of its word is reported.
        return msgspec.structs.replace(sampling, stop_token_ids=(), min_tokens=0, ignore_eos=False, logprobs=0)

    def open(self, lane: int) -> LaneRequest:
        """All that is written, in the lane's own tokens."""
        side = self.sides.get(lane)
        if side is None:
            return super().open(lane) if lane == BASE else SharedText.open(self, lane)
        side.tell()
        return LaneRequest(
            self.answer.request.request_id,
            self.prompts[lane],
            list(side.strand.tokens),
            self.sampling(lane),
            final=side.final,
            wants_top_probability=self.wants_top_probability(lane),
        )

    def extend(self, lane: int) -> Extension | None:
        """What is written since, in the lane's own tokens."""
        side = self.sides.get(lane)
        if side is None:
            return super().extend(lane)
        keep, tokens = side.strand.plan()
        if not tokens:
            return None
        side.tell()
        return Extension(self.answer.request.request_id, keep, tokens, side.final)

    # -- samples ----------------------------------------------------------------------------------------------

    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """The base has sampled the next position: decide who writes there. Or an expert has spoken."""
        side = self.sides.get(lane)
        if side is not None:
            side.said = sample
            if self.question is None or self.question.writer != lane:
                return ()
            return self._on_word(self.question, side)
        question = self.question
        if question is not None:
            return self._on_token(question, lane, sample)
        writer, deferral, fault = self._look(sample, fault)
        if fault is not None:
            return (fault,)
        if writer != BASE:
            side = self.sides.get(writer)
            if side is None:
                self.question = _Question(writer, sample.token, deferral, None, [], sample.top_probability, [])
                return (self.shared.waits[writer],)
            if self._word_begins(side, sample.token):
                side.begin_word()
                word = Word(side.strand.speller, bytes(self.text[-_LOOK_BACK:]))
                self.question = _Question(writer, sample.token, deferral, word, [], sample.top_probability, [])
                return self._on_word(self.question, side)
            self.words.counters.unaligned_deferrals += 1
        look = Look(sample.top_probability) if self.looks else None
        return self._write(Token(sample.token, BASE, deferral, look=look))

    def _on_token(self, question: _Question, lane: int, sample: Sample) -> Iterable[Decision]:
        """An expert that shares the base's vocabulary has spoken."""
        refused = self._heed(question, None, sample)
        if refused is not None:
            return refused
        self.question = None
        self.expert_tokens += 1
        agreed = sample.token == question.token
        self.words.counters.agreements += agreed
        return self._write(Token(sample.token, lane, question.deferral, look=question.look(agreed=agreed)))

    def _heed(self, question: _Question, side: Side | None, sample: Sample) -> Iterable[Decision] | None:
        """Take in how sure an expert is of its token; what follows if it stands back."""
        if sample.top_probability is not None:
            question.confidences.append(sample.top_probability)
        try:
            if not self._stands_back(sample):
                return None
        except ValueError as error:
            return (End(str(error), ErrorCode.BAD_READING),)
        self.words.counters.vetoed += 1
        return self._let_base_write(question, side, vetoed=True)

    def _word_begins(self, side: Side, token: int) -> bool:
        """Whether an expert can write where the base would write ``token``."""
        base = self._base
        upcoming = base.vocabulary.bytes_of(token) or b""
        if inside_character(self.text):
            return False
        if side is self.sides.get(self.last_writer):
            # The word before is its own, and it would begin another, whatever the base would go on with.
            return side.has_room
        if not begins_word(base.boundaries, bytes(self.text[-_LOOK_BACK:]), upcoming):
            return False
        side.follow(self.text)
        return side.can_write(upcoming)

    def _on_word(self, question: _Question, side: Side) -> Iterable[Decision]:
        """Take in what the expert says to its word so far, if it has spoken; else ask it."""
        word = question.word
        assert word is not None
        if not side.has_spoken:
            if side.has_room:
                return (self.shared.waits[question.writer],)
            return self._close(question, side)
        said = side.said
        assert said is not None
        assert said.logprobs is not None
        begin = len(word.text)
        goes_on = word.add(said.token)
        if goes_on or (word.ended and not word.tokens):
            # A token that begins the next word says nothing of this one.
            refused = self._heed(question, side, said)
            if refused is not None:
                return refused
        if not goes_on:
            if word.ended and not word.tokens:
                question.logprobs.append(said.logprobs.logprobs[0])
            return self._close(question, side)
        question.logprobs.append(said.logprobs.logprobs[0])
        side.strand.follow(word.text[begin:], [said.token])
        return self._on_word(question, side)

    def _close(self, question: _Question, side: Side) -> Iterable[Decision]:
        """The expert's word is complete: write it in base tokens."""
        word = question.word
        assert word is not None
        tokens = self._spelled(word)
        if not tokens:
            return self._let_base_write(question, side)
        self.question = None
        agreed = tokens[0] == question.token
        self.words.counters.agreements += agreed
        self.expert_tokens += len(tokens)
        look = question.look(agreed=agreed)
        word_of = len(tokens), sum(question.logprobs)
        first = Token(tokens[0], question.writer, question.deferral, word=word_of, look=look)
        further = Look(None, look.expert)
        return self._write(first, *(Token(token, question.writer, look=further) for token in tokens[1:]))

    def _spelled(self, word: Word) -> list[int]:
        """The base tokens of a word, up to where the request ends or its experts have written enough.

        None if it cannot be written.
        """
        answer = self.answer
        before = len(answer.tokens)
        if not word.tokens:
            end = self.words.end
            if end is None or not word.ended or answer.request.sampling.ignore_eos or before + 1 < answer.min_tokens:
                return []
            return [end]
        try:
            tokens = self._base.spell(word.text)
        except SpellingError:
            return []  # bytes that are no text
        limit = answer.request.collaboration.max_expert_tokens
        most = (
            answer.max_output - before if limit is None else min(answer.max_output - before, limit - self.expert_tokens)
        )
        for count, token in enumerate(tokens[:most], 1):
            if token in answer.stop_token_ids and before + count >= answer.min_tokens:
                return tokens[:count]
        return tokens[:most]

    def _let_base_write(self, question: _Question, side: Side | None, *, vetoed: bool = False) -> Iterable[Decision]:
        """What was deferred is the base's after all."""
        self.question = None
        if side is not None:
            side.strand.cut(len(self.text))
        return self._write(Token(question.token, BASE, question.deferral, look=question.look(), vetoed=vetoed))

    def _write(self, *tokens: Token) -> Iterator[Decision]:
        """Write tokens, then ask the base."""
        vocabulary = self._base.vocabulary
        for token in tokens:
            self.text += vocabulary.bytes_of(token.id) or b""
            self.last_writer = token.credit
            yield token
        yield self.shared.asks[BASE]

    def on_lane_lost(self, lane: int) -> Iterable[Decision]:
        """The next position was deferred to this lane: as ``expert_failure`` says."""
        self.words.counters.expert_failures += 1
        if self.shared.expert_failure == "error":
            return (LOST,)
        assert self.question is not None
        return self._let_base_write(self.question, self.sides.get(lane))

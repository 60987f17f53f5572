"""Members that write by characters, against brute force: lanes of any order and pace, preemption, aborts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.standin import StandinLane, mass_of
from engine import draws
from engine.lanes import Extension, Sample
from engine.lanes.shelf import Shelf
from engine.scheduler import LaneTerms, Scheduler
from engine.spelling.chorus import Chorus
from engine.spelling.speller import Speller
from engine.spelling.vocabulary import Vocabulary
from engine.strategies import Strategies
from engine.strategies.characters import Characters
from engine.strategies.characters.strategy import CharactersDecoding
from engine.types import NO_TOKEN, GenerationRequest
from tests.engine.builders import request
from tests.engine.oracle import Ledger
from tests.engine.test_scheduler_machine import hunt

MERGES = (
    [("a", "b"), ("ab", "c"), ("d", "e"), ("Ġ", "f")],
    [("b", "c"), ("a", "bc"), ("e", "f"), ("ef", "g"), ("Ġ", "a")],
    [("c", "d"), ("x", "y")],
)
CONTEXTS = (40, 44, 36)
MAX_REQUESTS = 6


@cache
def speller(lane: int) -> Speller:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *("".join(pair) for pair in MERGES[lane]), "<|end|>"]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, MERGES[lane]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return Speller(tokenizer, Vocabulary(tokenizer, stops=[len(names) - 1]))


def weights_of(asked: GenerationRequest, lanes: int) -> list[tuple[int, float]]:
    given = asked.collaboration.weights or tuple((lane, 1 / lanes) for lane in range(lanes))
    return [(lane, weight) for lane, weight in sorted(given) if weight]


def brute_force(asked: GenerationRequest, lanes: int) -> tuple[list[bytes], str]:
    """One request, one loop; every member's distribution after the whole of its tokens, in one order of lanes."""
    taking_part = weights_of(asked, lanes)
    sampling = asked.sampling
    chorus = Chorus(
        [speller(lane) for lane, _ in taking_part],
        [weight for _, weight in taking_part],
        kind=asked.collaboration.average,
        temperature=sampling.temperature,
        draw=lambda index: draws.uniform(sampling.seed or 0, draws.SYMBOL_STREAM, index),
        min_pieces=sampling.min_tokens,
        ignore_end=sampling.ignore_eos,
    )
    pieces: list[bytes] = []
    room = min(context - len(asked.prompt_of(lane)) for lane, context in enumerate(CONTEXTS[:lanes]))
    while True:
        masses = []
        for (lane, _), strand in zip(taking_part, chorus.strands, strict=True):
            masses.append(mass_of(lane, [*asked.prompt_of(lane), *strand.tokens], speller(lane).vocabulary))
        piece = chorus.write(masses)
        if piece.ended:
            return pieces, "stop"
        pieces.append(piece.text)
        full = any(
            len(asked.prompt_of(lane)) + len(strand.tokens) >= CONTEXTS[lane]
            for (lane, _), strand in zip(taking_part, chorus.strands, strict=True)
        )
        if full or len(pieces) >= min(sampling.max_tokens, room):
            return pieces, "length"


class CharactersMachine(RuleBasedStateMachine):
    @initialize(
        lanes=st.sampled_from((2, 3)),
        token_budget=st.sampled_from((3, 8, 500)),
        kv_tokens=st.sampled_from((50, 90, None)),
        max_num_seqs=st.integers(1, 4),
    )
    def build(self, lanes: int, token_budget: int, kv_tokens: int | None, max_num_seqs: int) -> None:
        self.shelf = Shelf()
        spellers = [speller(lane) for lane in range(lanes)]
        sizes = [max(each.vocabulary.stops) + 1 for each in spellers]
        self.scheduler = Scheduler(
            lanes=lanes,
            max_num_seqs=max_num_seqs,
            max_model_len=min(CONTEXTS),
            eos_token_ids=[],
            strategy=Strategies(
                lanes,
                has_gate=False,
                policy="never",
                characters=Characters(spellers, CONTEXTS[:lanes], self.shelf),
            ),
            terms=[
                LaneTerms(context, size, frozenset(each.vocabulary.stops))
                for context, size, each in zip(CONTEXTS, sizes, spellers, strict=False)
            ],
        )
        self.lanes = [
            StandinLane(
                lane,
                f"lane-{lane}",
                vocab_size=sizes[lane],
                max_model_len=CONTEXTS[lane],
                token_budget=token_budget,
                kv_tokens=kv_tokens,
                shelf=self.shelf,
                vocabulary=spellers[lane].vocabulary,
            )
            for lane in range(lanes)
        ]
        self.requests: dict[str, GenerationRequest] = {}
        self.under_way: dict[int, list[Sample]] = {}
        self.ledger = Ledger()
        self.texts: dict[str, list[bytes]] = {}
        self.events = 0

    @precondition(lambda self: len(self.requests) < MAX_REQUESTS)
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        count = len(self.lanes)
        prompts = [data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=12)) for _ in range(count)]
        cut = data.draw(st.sampled_from((0.0, 0.3, 0.5, 1.0)))
        weights = data.draw(st.sampled_from(((), ((0, cut), (1, 1 - cut)), ((count - 1, 1.0),))))
        new = request(
            str(len(self.requests)),
            prompts[0],
            max_tokens=data.draw(st.integers(1, 20)),
            min_tokens=data.draw(st.sampled_from((0, 0, 6))),
            ignore_eos=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 1 << 62)),
            temperature=data.draw(st.sampled_from((0.0, 0.7, 1.0))),
            prompts=tuple(enumerate(prompts[1:], 1)),
            strategy="characters",
            weights=weights,
            average=data.draw(st.sampled_from(("mixture", "geometric"))),
        )
        self.requests[new.request_id] = new
        self.scheduler.add(new)

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, MAX_REQUESTS))
    def abort(self, choice: int) -> None:
        self.scheduler.abort(list(self.requests)[choice % len(self.requests)])

    @rule(lane=st.integers(0, 2))
    def start(self, lane: int) -> None:
        lane %= len(self.lanes)
        if lane in self.under_way:
            return
        self.lanes[lane].apply(self.scheduler.plan(lane))
        if self.lanes[lane].has_work():
            self.events += 1
            self.under_way[lane] = self.lanes[lane].start().result().samples

    @precondition(lambda self: self.under_way)
    @rule(choice=st.integers(0, 2))
    def land(self, choice: int) -> None:
        lane = sorted(self.under_way)[choice % len(self.under_way)]
        self.events += 1
        self.scheduler.land(lane, self.under_way.pop(lane))

    @rule(lane=st.integers(0, 2), choice=st.integers(0, 7))
    def preempt(self, lane: int, choice: int) -> None:
        driven = self.lanes[lane % len(self.lanes)]
        rows = [held.removeprefix("request ") for held in driven.leftovers() if held.startswith("request ")]
        if rows:
            driven.preempt(rows[choice % len(rows)])

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, MAX_REQUESTS), lane=st.integers(0, 2), offset=st.sampled_from((-1, 1, 2)))
    def land_stray(self, choice: int, lane: int, offset: int) -> None:
        """A sample at a position that is not open brings nothing."""
        self.collect()
        stray = list(self.requests.values())[choice % len(self.requests)]
        lane %= len(self.lanes)
        decoding: Any = self.scheduler._running.get(stray.request_id)
        if decoding is None or lane not in decoding.lanes:
            return
        position = len(stray.prompt_of(lane)) + len(decoding.strands[lane].tokens) + offset
        self.scheduler.land(lane, [Sample(stray.request_id, position, 1)])
        assert self.scheduler.take_deltas() == []

    @rule()
    def collect(self) -> None:
        deltas = self.scheduler.take_deltas()
        self.ledger.take(deltas)
        for delta in deltas:
            assert len(delta.texts) == len(delta.tokens)
            self.texts.setdefault(delta.request_id, []).extend(delta.texts)

    @precondition(lambda self: self.requests)
    @rule()
    def settle(self) -> None:
        events = -1
        while self.events > events:
            events = self.events
            assert events < 20_000
            for lane in range(len(self.lanes)):
                self.start(lane)
                if self.under_way:
                    self.land(0)
        self.collect()
        assert self.scheduler.idle
        for lane in self.lanes:
            assert lane.leftovers() == []
        assert self.shelf._bytes == 0
        self.compare(whole=True)

    def compare(self, *, whole: bool) -> None:
        for request_id, asked in self.requests.items():
            got = self.ledger.got.get(request_id)
            pieces = self.texts.get(request_id, [])
            expected, reason = brute_force(asked, len(self.lanes))
            assert pieces == expected[: len(pieces)]
            if got is None or got.finish_reason is None:
                assert not whole
                continue
            assert got.finish_reason in (reason, "aborted"), got.error
            assert got.finish_reason == "aborted" or pieces == expected
            assert set(got.tokens) <= {NO_TOKEN}

    def teardown(self) -> None:
        if getattr(self, "requests", None):
            self.settle()


TestCharactersMachine = CharactersMachine.TestCase
TestCharactersMachine.settings = settings(max_examples=25, stateful_step_count=25)


def forgets_the_base(self: CharactersDecoding, lane: int) -> Extension | None:
    """The first member is told tokens as if nothing were cut."""
    extension = EXTEND(self, lane)
    if lane or extension is None:
        return extension
    return Extension(extension.request_id, extension.keep, extension.tokens[-1:], 0)


def keeps_masses(self: CharactersDecoding, lane: int, sample: Sample, fault: Any) -> Any:
    """What a lane said first counts for ever."""
    before = self.masses.get(lane)
    found = ON_SAMPLE(self, lane, sample, fault)
    if before is not None and lane == self.lanes[-1]:
        self.masses[lane] = before
    return found


def positions_only(self: CharactersDecoding, lane: int, position: int) -> bool:
    """Whoever samples at the right position is believed, told or not, asked or not."""
    return position >= len(self._prompts.get(lane, ())) + len(self.chorus.strands[0].tokens)


EXTEND, ON_SAMPLE = CharactersDecoding.extend, CharactersDecoding.on_sample


@pytest.mark.parametrize(
    ("method", "sabotage"),
    [("extend", forgets_the_base), ("on_sample", keeps_masses), ("awaits", positions_only)],
)
def test_the_machine_finds(method: str, sabotage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CharactersDecoding, method, sabotage)
    hunt(CharactersMachine, max_examples=500, stateful_step_count=30)

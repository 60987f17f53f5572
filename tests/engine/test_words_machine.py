"""Deferral over several vocabularies against brute force, whatever the lanes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from engine.lanes import Sample
from engine.lanes.shelf import Shelf
from engine.scheduler import Scheduler
from engine.spelling.strand import Strand
from engine.strategies import Strategies
from engine.strategies.words import strategy
from engine.strategies.words.side import Side
from engine.strategies.words.strategy import WordsDecoding
from engine.types import BASE, GenerationRequest
from tests.engine import toys, words_oracle
from tests.engine.builders import POLICY_NAMES, request
from tests.engine.drawn import Focus
from tests.engine.oracle import Pair, Written, check
from tests.engine.test_scheduler_machine import LANE, MAX_REQUESTS, SchedulerMachine, must_be_found

LONGEST = 40


def prompts_of(lane: int, *, long: bool = False) -> st.SearchStrategy[list[int]]:
    """Now and then, or always, one that leaves little room."""
    token = st.integers(0, toys.size(lane) - 1)
    if long:
        return st.lists(token, min_size=LONGEST - 8, max_size=LONGEST - 1)
    return st.lists(token, min_size=1, max_size=4) | st.lists(token, min_size=1, max_size=LONGEST - 1)


@st.composite
def requests(draw: st.DrawFn, request_id: str, pair: Pair, focus: Focus) -> GenerationRequest:
    """Where the focus is on deferral, every position is deferred; where it is on room, experts have little."""
    plain = focus in ("deferral", "room")
    token = st.integers(0, toys.size(BASE) - 1)
    return request(
        request_id,
        draw(prompts_of(BASE)),
        client=draw(st.sampled_from("xyz")),
        max_tokens=draw(st.integers(1, 30)),
        min_tokens=draw(st.integers(0, 18)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(token, max_size=2))),
        seed=draw(st.integers(-(1 << 63), (1 << 64) - 1)),
        prompt_logprobs=draw(st.none() | st.integers(0, 2)),
        member=None if plain else draw(st.sampled_from((None, None, None, None, 0))),
        policy="always" if plain else draw(st.none() | st.sampled_from((*POLICY_NAMES, "always", "always"))),
        threshold=draw(st.none() | st.floats(0, 1)),
        rate=draw(st.floats(0, 1)),
        max_expert_tokens=draw(st.none() | st.integers(0, 6)),
        experts=None if plain else draw(st.none() | st.lists(st.integers(1, pair.experts), unique=True).map(tuple)),
        run_ahead=draw(st.sampled_from((None, "off", "auto", 1, 7))),
        veto=draw(st.sampled_from((None, None, 0.2, 0.5))),
        looks=draw(st.booleans()),
        prompts=tuple((lane, draw(prompts_of(lane, long=focus == "room"))) for lane in range(1, pair.lanes)),
    )


class WordsMachine(SchedulerMachine):
    @initialize(
        experts=st.sampled_from((1, 2, 2)),
        has_gate=st.sampled_from((True, True, True, False)),
        policy=st.sampled_from(POLICY_NAMES),
        threshold=st.floats(0.2, 0.8),
        max_num_seqs=st.integers(1, 6),
        token_budget=st.sampled_from((3, 8, 20, 500)),
        kv_tokens=st.sampled_from((40, 60, 100, None)),
        lane_kind=st.integers(0, 1),
        base_steps=st.sampled_from((1, 1, 4)),
    )
    def build(self, lane_kind: int, token_budget: int, kv_tokens: int | None, base_steps: int, **fields: Any) -> None:
        self.base_steps = base_steps
        pair = Pair(max_model_len=LONGEST, vocab_size=toys.size(BASE), eos=(toys.end(BASE),), **fields)
        self.pair = pair
        self.scheduler = Scheduler(
            lanes=pair.lanes,
            max_num_seqs=pair.max_num_seqs,
            max_model_len=pair.max_model_len,
            eos_token_ids=pair.eos,
            strategy=Strategies(
                pair.lanes,
                has_gate=pair.has_gate,
                policy=pair.policy,
                threshold=pair.threshold,
                spellers=[toys.speller(lane) for lane in range(pair.lanes)],
                contexts=[LONGEST] * pair.lanes,
                end=toys.end(BASE),
            ),
        )
        shelf = Shelf()
        self.lanes = [
            self.lane_types[lane_kind](
                lane,
                f"lane-{lane}",
                experts=pair.experts if lane == BASE and pair.has_gate else 0,
                vocab_size=toys.size(lane),
                max_model_len=LONGEST,
                token_budget=token_budget,
                kv_tokens=kv_tokens,
                shelf=shelf,
            )
            for lane in range(pair.lanes)
        ]
        self.begin()

    def drawn_request(self, data: st.DataObject, request_id: str) -> GenerationRequest:
        return data.draw(requests(request_id, self.pair, self.focus))

    @precondition(lambda self: self.landed)
    @rule(choice=st.integers(0, 1 << 16), newest=st.booleans())
    def land_again(self, choice: int, newest: bool) -> None:
        """The newest only: what an expert was told may come to the same length again, and differ."""
        self.inject(*self.landed[-1])

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, MAX_REQUESTS), lane=LANE, offset=st.sampled_from((-2, -1, 1, 2, 60)))
    def land_stray(self, choice: int, lane: int, offset: int) -> None:
        """The base's, at a position that is not open, or an expert's, at one that never will be."""
        self.collect()
        stray = list(self.requests.values())[choice % len(self.requests)]
        lane %= self.pair.lanes
        written = self.ledger.got.get(stray.request_id)
        position = len(stray.prompt) + (len(written.tokens) if written else 0) + offset
        if lane != BASE:
            position = 1000
        self.inject(lane, Sample(stray.request_id, position, 1, [1.0] * self.pair.experts, 0.5))

    def check(self, written: Written, request: GenerationRequest) -> None:
        alone = request.collaboration.experts == () or request.collaboration.member is not None
        check(written, request, self.pair, *() if alone else (words_oracle.complete,))


TestWordsMachine = WordsMachine.TestCase
TestWordsMachine.settings = settings(
    max_examples=120, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


# -- sabotages ------------------------------------------------------------------------------------------------


def follows_without_its_own_tokens(self: Strand, text: bytes, own: object = ()) -> None:
    FOLLOW(self, text)


def spells_only_what_is_new(self: Strand, since: int) -> tuple[int, ...]:
    self._append(self.speller.spell(bytes(self.text[since:])))
    return ()


FOLLOW = Strand.follow
ALWAYS = property(lambda _: True)
PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "an expert is asked inside its tokens": lambda patch: patch.setattr(Strand, "aligned", lambda *_: True),
    "an expert is asked inside the base's words": lambda patch: patch.setattr(strategy, "begins_word", lambda *_: True),
    "an expert is asked inside a character": lambda patch: patch.setattr(
        strategy, "inside_character", lambda *_: False
    ),
    "an expert's old word is believed": lambda patch: patch.setattr(
        Side, "has_spoken", property(lambda self: self.said is not None)
    ),
    "an expert's lane is told more than it can hold": lambda patch: patch.setattr(Side, "has_room", ALWAYS),
    "an expert's own tokens are spelled anew": lambda patch: patch.setattr(
        Strand, "follow", follows_without_its_own_tokens
    ),
    "others' text is not spelled anew": lambda patch: patch.setattr(Strand, "_respell", spells_only_what_is_new),
    "no expert stands back": lambda patch: patch.setattr(WordsDecoding, "_stands_back", lambda *_: False),
    "max_expert_tokens is not looked at": lambda patch: patch.setattr(WordsDecoding, "may_defer", ALWAYS),
}


@pytest.mark.parametrize("sabotage", PATCHES)
def test_finds_patch(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PATCHES[sabotage](monkeypatch)
    must_be_found(WordsMachine, "room" if "can hold" in sabotage else "deferral")

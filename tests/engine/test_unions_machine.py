"""Unions over several vocabularies against brute force, whatever the lanes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from bench.standin import StandinLane
from engine.blends import Blend
from engine.lanes import Sample
from engine.lanes.shelf import Shelf
from engine.scheduler import Scheduler
from engine.spelling.strand import Strand
from engine.strategies import Strategies
from engine.strategies.unions import strategy
from engine.strategies.unions.reader import Reader
from engine.strategies.unions.strategy import UnionsDecoding
from engine.types import BASE, GenerationRequest
from tests.engine import toys, unions_oracle
from tests.engine.builders import POLICY_NAMES, RepeatingLane, request
from tests.engine.oracle import Pair, Written
from tests.engine.oracle import check as same
from tests.engine.test_scheduler_machine import LANE, MAX_REQUESTS, SchedulerMachine, must_be_found
from tests.engine.test_words_machine import LONGEST, prompts_of


@st.composite
def requests(draw: st.DrawFn, request_id: str, pair: Pair, *, plain: bool = False) -> GenerationRequest:
    """Of a ``plain`` one every position is asked for, greedily."""
    lanes = sorted(draw(st.sets(st.integers(1, pair.experts), min_size=1)))
    if plain or draw(st.booleans()):
        lanes = [BASE, *lanes]
    weights = [draw(st.sampled_from((1.0, 1.0, 3.0))) for _ in lanes]
    total = sum(weights)
    blend = Blend(
        "union",
        tuple((lane, weight / total) for lane, weight in zip(lanes, weights, strict=True)),
        top=draw(st.sampled_from((1, 3, 10))),
        score=draw(st.sampled_from((None, "first", "mass"))),
        align=draw(st.sampled_from((None, True, False))),
    )
    token = st.integers(0, toys.size(BASE) - 1)
    return request(
        request_id,
        draw(prompts_of(BASE)),
        client=draw(st.sampled_from("xyz")),
        max_tokens=draw(st.integers(1, 30)),
        min_tokens=draw(st.sampled_from((0, 0, 0, 9))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(token, max_size=2))),
        seed=draw(st.integers(-(1 << 63), (1 << 64) - 1)),
        temperature=0.0 if plain else draw(st.sampled_from((0.0, 0.0, 0.8, 1.0))),
        top_k=draw(st.sampled_from((0, 0, 3))),
        top_p=draw(st.sampled_from((1.0, 1.0, 0.7))),
        min_p=draw(st.sampled_from((0.0, 0.0, 0.1))),
        policy="always" if plain else draw(st.none() | st.sampled_from((*POLICY_NAMES, "always", "always"))),
        threshold=draw(st.none() | st.floats(0, 1)),
        rate=draw(st.floats(0, 1)),
        max_expert_tokens=None if plain else draw(st.none() | st.integers(0, 6)),
        run_ahead=draw(st.sampled_from((None, "off", "auto", 1, 3, 9))),
        prompts=tuple((lane, draw(prompts_of(lane))) for lane in range(1, pair.lanes)),
        blend=blend,
    )


class Lane(StandinLane):
    def _write(self, tokens: Any) -> int:
        return super()._write(tokens) if self._number else unions_oracle.drafted(list(tokens))


class Repeating(Lane, RepeatingLane):
    pass


class UnionsMachine(SchedulerMachine):
    lane_types = (Lane, Repeating)

    @initialize(
        experts=st.sampled_from((1, 1, 2)),
        has_gate=st.sampled_from((True, True, False)),
        policy=st.sampled_from(POLICY_NAMES),
        threshold=st.floats(0.2, 0.8),
        max_num_seqs=st.integers(1, 6),
        token_budget=st.sampled_from((3, 8, 20, 500)),
        kv_tokens=st.sampled_from((40, 60, 100, None)),
        lane_kind=st.integers(0, 1),
        base_steps=st.sampled_from((1, 4, 4)),
    )
    def build(self, lane_kind: int, token_budget: int, kv_tokens: int | None, base_steps: int, **fields: Any) -> None:
        self.base_steps = base_steps
        pair = Pair(max_model_len=LONGEST, vocab_size=toys.size(BASE), eos=(toys.end(BASE),), **fields)
        self.pair = pair
        self.shelf = Shelf()
        strategies = Strategies(
            pair.lanes,
            has_gate=pair.has_gate,
            policy=pair.policy,
            threshold=pair.threshold,
            spellers=[toys.speller(lane) for lane in range(pair.lanes)],
            contexts=[LONGEST] * pair.lanes,
            end=toys.end(BASE),
            shelf=self.shelf,
        )
        assert strategies.unions is not None
        self.unions = strategies.unions
        self.room = self.unions.room
        self.scheduler = Scheduler(
            lanes=pair.lanes,
            max_num_seqs=pair.max_num_seqs,
            max_model_len=pair.max_model_len,
            eos_token_ids=pair.eos,
            strategy=strategies,
        )
        self.lanes = [
            self.lane_types[lane_kind](
                lane,
                f"lane-{lane}",
                experts=pair.experts if lane == BASE and pair.has_gate else 0,
                vocab_size=toys.size(lane),
                max_model_len=LONGEST,
                token_budget=token_budget,
                kv_tokens=kv_tokens,
                shelf=self.shelf,
                vocabulary=toys.speller(lane).vocabulary,
            )
            for lane in range(pair.lanes)
        ]
        self.begin()

    def drawn_request(self, data: st.DataObject, request_id: str) -> GenerationRequest:
        return data.draw(requests(request_id, self.pair, plain=self.focus == "deferral"))

    @precondition(lambda self: self.landed)
    @rule(choice=st.integers(0, 1 << 16), newest=st.booleans())
    def land_again(self, choice: int, newest: bool) -> None:
        """The newest only: what was told may come to the same length again, and differ."""
        self.inject(*self.landed[-1])

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, MAX_REQUESTS), lane=LANE, offset=st.integers(60, 61))
    def land_stray(self, choice: int, lane: int, offset: int) -> None:
        """At a position that never will be open."""
        self.collect()
        stray = list(self.requests.values())[choice % len(self.requests)]
        self.inject(lane % self.pair.lanes, Sample(stray.request_id, 1000 + offset, 1, [1.0] * self.pair.experts, 0.5))

    def check(self, written: Written, request: GenerationRequest) -> None:
        wanted = unions_oracle.complete(request, self.pair)
        count = len(written.tokens)
        assert [at for at, _ in written.support] == [at for at, _ in wanted.support if at < count]
        for (_, got), (_, said) in zip(written.support, wanted.support, strict=False):
            assert got == pytest.approx(said, abs=1e-9)
        wanted.support = written.support
        same(written, request, self.pair, lambda *_: wanted)

    def settle_everything(self) -> None:
        assert self.unions.room == self.room

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "pair"):
            self.settle_everything()


TestUnionsMachine = UnionsMachine.TestCase
TestUnionsMachine.settings = settings(
    max_examples=40, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


# -- sabotages ------------------------------------------------------------------------------------------------


def follows_whatever_changes(self: Reader, text: bytes, asked: object) -> bool:
    return FOLLOW(self, text, ())


FOLLOW = Reader.follow
PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "an expert is asked inside its tokens": lambda patch: patch.setattr(Strand, "aligned", lambda *_: True),
    "a draft may change an open position": lambda patch: patch.setattr(Reader, "follow", follows_whatever_changes),
    "drafts that were cut stay in the experts' tokens": lambda patch: patch.setattr(Reader, "rewind", lambda *_: None),
    "the base is always believed": lambda patch: patch.setattr(strategy, "agreed", lambda *_: True),
    "the base is never believed": lambda patch: patch.setattr(strategy, "agreed", lambda *_: False),
    "max_expert_tokens is not looked at": lambda patch: patch.setattr(
        UnionsDecoding, "may_defer", property(lambda _: True)
    ),
}


SLOWLY_FOUND = ("a draft may change an open position", "max_expert_tokens is not looked at")


@pytest.mark.parametrize(
    "sabotage", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOWLY_FOUND)) for name in PATCHES]
)
def test_finds_patch(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PATCHES[sabotage](monkeypatch)
    must_be_found(UnionsMachine, "deferral" if "max_expert" not in sabotage else "all")

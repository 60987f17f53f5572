"""Deferral over several vocabularies, step by step: what the machine does not drive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.lanes import Extension, LaneRequest, Sample
from engine.scheduler import Scheduler
from engine.spelling.speller import Speller
from engine.strategies import Strategies
from engine.types import BASE, StructuredOutputs, TokenLogprobs, WrittenWord
from tests.engine import toys
from tests.engine.builders import Rig, request
from tests.engine.oracle import Ledger, Written
from tests.engine.words_oracle import bytes_of, spell

PROMPT = [2, 3]


class Hand:
    """A scheduler whose lanes are played by hand: what each samples is said in text."""

    def __init__(self, *, spellers: Sequence[Speller | None] | None = None, context: int = 40, **options: Any) -> None:
        self.strategies = Strategies(
            2,
            has_gate=False,
            policy="always",
            spellers=[toys.speller(0), toys.speller(1)] if spellers is None else spellers,
            contexts=[40, context],
            end=toys.end(BASE),
            **options,
        )
        self.scheduler = Scheduler(
            lanes=2, max_num_seqs=4, max_model_len=40, eos_token_ids=[toys.end(BASE)], strategy=self.strategies
        )
        self.held: list[list[int]] = [[], []]
        self.told: LaneRequest | Extension | None = None
        self.ledger = Ledger()

    def add(self, **fields: Any) -> None:
        usual = {"max_tokens": 20, "ignore_eos": False, "prompts": ((1, PROMPT),)}
        self.scheduler.add(request("a", PROMPT, **{**usual, **fields}))

    def plan(self, lane: int) -> None:
        """Take in what the lane is told."""
        work = self.scheduler.plan(lane)
        for added in work.add:
            self.held[lane], self.told = list(added.written), added
        for extension in work.extend:
            self.held[lane][extension.keep :] = extension.tokens
            self.told = extension

    def says(self, lane: int, text: bytes | int) -> None:
        """Plan the lane, then let it sample the one token that is ``text``, or a token by its id."""
        self.plan(lane)
        self.samples(lane, text)

    def samples(self, lane: int, text: bytes | int) -> None:
        token = text if isinstance(text, int) else spell(lane, text)[0]
        assert isinstance(text, int) or bytes_of(lane, token) == text
        position = len(PROMPT) + len(self.held[lane])
        self.scheduler.land(lane, [Sample("a", position, token, None, 0.5, TokenLogprobs([token], [-0.25], 1))])

    def got(self) -> Written:
        self.ledger.take(self.scheduler.take_deltas())
        return self.ledger.got.get("a", Written())

    @property
    def text(self) -> bytes:
        return b"".join(bytes_of(BASE, token) or b"" for token in self.got().tokens)


def test_a_word_is_the_experts_tokens_up_to_the_next_words_first() -> None:
    hand = Hand()
    hand.add()
    hand.says(0, b"a")
    for part in (b"ba", b"b", b" b"):
        assert hand.text == b""
        hand.says(1, part)
    got = hand.got()
    assert hand.text == b"bab"
    assert got.tokens == spell(BASE, b"bab")
    assert got.sources == [1] * len(got.tokens)
    assert got.words == [WrittenWord(0, len(got.tokens), 1, -0.5)]
    # What closed the word begins the next one, without another step of the expert's.
    hand.says(0, b" a")
    hand.says(1, b"a")
    assert hand.held[1] == [*spell(1, b"ba"), *spell(1, b"b"), *spell(1, b" b")]
    hand.says(1, b".")
    assert hand.text == b"bab ba"
    assert hand.got().words[1] == WrittenWord(2, 3, 1, -0.5)


def test_a_word_stands_back_at_its_first_unsure_token() -> None:
    """Not at the one that closes it, which is the next word's first."""
    hand = Hand()
    hand.add(veto=0.6)
    hand.says(0, b"a")
    hand.says(1, b"ba")  # half sure, as all that the hand says
    assert hand.text == b"a"
    assert hand.got().sources == [0]
    assert hand.got().vetoed == [0]
    assert hand.scheduler.counters.vetoed == 1


def test_words_are_not_taken_back() -> None:
    hand = Hand()
    hand.add(regret=0.5)
    error = hand.got().error
    assert error is not None
    assert "an expert with a vocabulary of its own writes words" in error
    assert hand.held[1] != spell(1, b"ba")


def test_within_a_word_of_the_bases_the_base_writes() -> None:
    hand = Hand()
    hand.add(experts=(1,), max_expert_tokens=5, policy="random", rate=1.0)
    hand.says(0, b"b")
    hand.says(1, toys.tokenizer(1).token_to_id(toys.MARK))
    hand.says(0, b"a")
    assert hand.text == b"ba"
    assert hand.got().sources == [0, 0]
    assert hand.scheduler.counters.unaligned_deferrals == 1


def test_behind_its_own_word_an_expert_is_asked_whatever_the_base_would_go_on_with() -> None:
    hand = Hand()
    hand.add()
    hand.says(0, b"ab")
    hand.says(1, b"b")
    hand.says(1, b" ")
    hand.says(0, b"a")
    hand.says(1, b"a")
    hand.says(1, b".")
    assert hand.text == b"b a"
    assert hand.got().sources == [1, 1]
    assert hand.scheduler.counters.unaligned_deferrals == 0


def test_an_experts_end_is_the_bases() -> None:
    hand = Hand()
    hand.add()
    hand.says(0, b"a")
    hand.says(1, toys.end(1))
    got = hand.got()
    assert (got.tokens, got.sources, got.finish_reason) == ([toys.end(BASE)], [1], "stop")
    assert got.stop_token == toys.end(BASE)
    assert got.words == [WrittenWord(0, 1, 1, -0.25)]


@pytest.mark.parametrize(
    "fields",
    [{"min_tokens": 2}, {"ignore_eos": True}, {"ignore_eos": True, "stop_token_ids": (toys.end(BASE),)}],
)
def test_an_end_that_does_not_count_leaves_the_word_to_the_base(fields: dict[str, Any]) -> None:
    hand = Hand()
    hand.add(**fields)
    hand.says(0, b"a")
    hand.says(1, toys.end(1))
    assert (hand.got().tokens, hand.got().sources) == (spell(BASE, b"a"), [0])
    assert hand.got().finish_reason is None


def test_special_tokens_are_not_written() -> None:
    hand = Hand()
    hand.add()
    hand.says(0, b"a")
    hand.says(1, toys.tokenizer(1).token_to_id(toys.MARK))
    assert (hand.text, hand.got().sources) == (b"a", [0])


@pytest.mark.parametrize(("limits", "reason"), [({"max_tokens": 1}, "length"), ({"max_expert_tokens": 1}, None)])
def test_a_word_is_cut_where_no_more_may_be_written(limits: dict[str, int], reason: str | None) -> None:
    hand = Hand()
    hand.add(**limits)
    hand.says(0, b"a")
    for part in (b"a", b"a", b" b"):
        hand.says(1, part)
    got = hand.got()
    assert hand.text == b"a"
    assert got.finish_reason == reason
    assert got.words == [WrittenWord(0, 1, 1, -0.5)]
    if reason is None:
        hand.says(0, b" a")
        assert (hand.text, hand.got().sources) == (b"a a", [1, 0])


def test_a_lost_expert_is_forgotten_with_its_word() -> None:
    hand = Hand(expert_failure="base")
    hand.add()
    hand.says(0, b"a")
    hand.says(1, b"ba")
    hand.plan(1)
    hand.scheduler.lose(1)
    assert (hand.text, hand.got().sources) == (b"a", [0])
    assert hand.scheduler.counters.expert_failures == 1
    hand.samples(1, b"b")
    hand.scheduler.regain(1)
    hand.says(0, b" a")
    hand.says(1, b" b")
    assert isinstance(hand.told, Extension)
    assert (hand.told.keep, hand.held[1]) == (0, spell(1, b"a"))


def test_a_lost_expert_ends_the_request() -> None:
    hand = Hand()
    hand.add()
    hand.says(0, b"a")
    hand.plan(1)
    hand.scheduler.lose(1)
    assert hand.got().finish_reason == "error"


def test_a_lane_that_cannot_be_cut_to_nothing_is_not_asked() -> None:
    """After a first word that came to nothing, and as long as there is no text in its place."""
    hand = Hand(expert_failure="base")
    hand.add()
    hand.says(0, toys.tokenizer(BASE).token_to_id(toys.MARK))
    hand.says(1, b"ba")
    hand.plan(1)
    hand.scheduler.lose(1)
    hand.samples(1, b"b")
    hand.scheduler.regain(1)
    hand.says(0, b"a")
    assert (hand.text, hand.got().sources) == (b"a", [0, 0])


def test_an_expert_without_room_is_not_asked() -> None:
    hand = Hand(context=4)
    hand.add()
    hand.says(0, b"a")
    hand.says(1, b"a")
    hand.says(1, b" b")
    assert hand.text == b"a"
    hand.says(0, b" a")
    # The lane holds two tokens of the prompt and one of the text; it has no place to sample after another.
    assert hand.text == b"a b"
    hand.says(0, b" a")
    assert hand.got().sources == [1, 1, 1, 0]


def test_lanes_that_cannot_take_tokens_back_are_refused() -> None:
    hand = Hand(words_obstacle="codes cannot take tokens back")
    hand.add()
    assert hand.got().error == "members of different vocabularies: codes cannot take tokens back"


def test_an_expert_that_writes_everything_sees_its_own_tokens() -> None:
    """The base would end the text at every word; the expert's text is what it writes alone, its tokens untouched."""
    hand = Hand()
    hand.add(max_tokens=30)
    own = [b"a", b"ba", b" b", b"b", b".", b" b", b"a", b"\xc3", b"\xa9", b"  ", b"a", b"\n", b"b"]
    hand.says(0, toys.end(BASE))
    for part in own:
        before = len(hand.got().words)
        hand.says(1, part)
        if len(hand.got().words) > before:
            hand.says(0, toys.end(BASE))
    hand.plan(1)
    assert hand.held[1] == [spell(1, part)[0] for part in own]
    assert hand.text == b"aba bb. ba\xc3\xa9  a\n"
    assert set(hand.got().sources) == {1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 0),
        ("logit_bias", {1: 1.0}),
        ("allowed_token_ids", (1, 2)),
        ("bad_words", ((1,),)),
        ("structured_outputs", StructuredOutputs(regex="a")),
    ],
)
def test_what_names_tokens_is_refused(field: str, value: Any) -> None:
    hand = Hand()
    hand.add(**{field: value})
    assert hand.got().error == f"{field}: cannot be served by members of different vocabularies"


def test_experts_of_the_bases_vocabulary_write_tokens_as_ever() -> None:
    """With the word rule off it is deferral, to the token."""
    options = {"policy": "threshold", "threshold": 0.4, "max_num_seqs": 3}
    requests = [request(str(number), [number], max_tokens=24, seed=number, run_ahead="off") for number in range(20)]
    deferral, words = Rig(**options), Rig(**options)
    strategies = words.scheduler._strategy
    assert isinstance(strategies, Strategies)
    strategies.words.spellers = [toys.speller(0), None]
    strategies.words.concerns = lambda _: True  # type: ignore[method-assign]
    strategies._check_prompts = lambda _: None  # type: ignore[method-assign]
    for rig in (deferral, words):
        rig.add(*requests)
    assert words.run() == deferral.run()
    assert {source for got in words.ledger.got.values() for source in got.sources} == {0, 1}

"""A request's grammar in a lane: what its masks may cost, and where the answer may end."""

from __future__ import annotations

import json
import time
import warnings

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLParserLimits

from engine.config import LaneConfig
from engine.grammar.forms import grammar_of
from engine.grammar.worker import Setup, parser_limits, tokenizer_of
from engine.types import SamplingSpec, StructuredOutputs
from engine.vllm_hooks.options import prepare_environment
from tests.oracle import pairs

prepare_environment((LaneConfig(model="none"),))

with warnings.catch_warnings():
    # vLLM and torch warn of their own affairs while they are imported.
    warnings.simplefilter("ignore")
    from engine.vllm_hooks.grammars import MASK_SECONDS_AT_ONCE, MASK_SECONDS_PER_TOKEN, TOO_COMPLEX, LaneGrammar

END = 7
"""Not the vocabulary's first id, which is text here."""


class Stub:
    """A matcher whose masks take processor time and allow some tokens of 64."""

    def __init__(self, seconds: float = 0.0, allowed: tuple[int, ...] = (0,)) -> None:
        self.seconds = seconds
        self.allowed = allowed
        self.is_broken = False

    def consume_token(self, token: int) -> bool:
        return token in self.allowed

    def compute_bitmask(self) -> bytes:
        begin = time.thread_time()
        while time.thread_time() - begin < self.seconds:
            pass
        return np.packbits([token in self.allowed for token in range(64)], bitorder="little").tobytes()

    def is_error(self) -> bool:
        return self.is_broken

    def get_error(self) -> str:
        return "a bound" if self.is_broken else "doesn't satisfy the grammar"


def allowed_of(grammar: LaneGrammar) -> list[int]:
    """Tokens that the next mask allows, in the second row of a batch's masks; the first one stays as it was."""
    masks = torch.zeros(2, 2, dtype=torch.int32)
    grammar.fill_bitmask(masks, 1)
    assert masks[0].tolist() == [0, 0]
    bits = np.unpackbits(masks[1].numpy().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


EVERYTHING = list(range(64))


def test_masks_that_take_too_long_end_the_request() -> None:
    grammar = LaneGrammar(Stub(MASK_SECONDS_AT_ONCE / 4), SamplingSpec(), [END], END)
    steps = 0
    while grammar.problem is None:
        assert steps < 20, "the bound does not hold"
        masks = allowed_of(grammar)
        steps += 1
    # What may be spent in advance is spent first.
    assert steps >= 3
    assert "too long" in grammar.problem
    assert masks == EVERYTHING


def test_masks_within_the_bound_go_on() -> None:
    grammar = LaneGrammar(Stub(MASK_SECONDS_PER_TOKEN / 10), SamplingSpec(), [END], END)
    for _ in range(100):
        assert allowed_of(grammar) == [0]
    assert grammar.problem is None


def test_an_empty_mask_is_a_problem() -> None:
    grammar = LaneGrammar(Stub(allowed=()), SamplingSpec(), [END], END)
    assert allowed_of(grammar) == EVERYTHING
    assert grammar.problem == "no token of the vocabulary continues the answer"


def test_a_matcher_that_gives_up_is_a_problem() -> None:
    stub = Stub()
    stub.is_broken = True
    grammar = LaneGrammar(stub, SamplingSpec(), [END], END)
    assert allowed_of(grammar) == EVERYTHING
    assert grammar.problem == "the form became too complex to follow"


def test_a_token_that_breaks_the_form_is_not_accepted() -> None:
    grammar = LaneGrammar(Stub(allowed=(3,)), SamplingSpec(), [END], END)
    assert grammar.accept_tokens("one", [3, 3])
    assert not grammar.accept_tokens("one", [4])
    assert grammar.problem is None


def test_a_token_that_the_back_end_cannot_go_on_from_is_a_problem(random_pair: pairs.Served) -> None:
    """Of two that are refused, one breaks the form; the other makes more of a row than the back end follows."""
    text = (random_pair.base / "tokenizer.json").read_text()
    tokenizer = tokenizer_of(Setup(text, 512, 0, any_whitespace=True, seconds=2, memory=1 << 30))
    many = {"type": "object", "properties": {f"p{number}": {} for number in range(200)}}
    form = grammar_of(StructuredOutputs(json=json.dumps(many)))
    (brace,) = tokenizer.tokenize_str("{")
    for limit, token, problem in (
        (2000, brace, None),
        (2000, brace + 1, None),
        (500, brace, TOO_COMPLEX),
    ):
        limits = LLParserLimits(max_items_in_row=limit, verbose_errors=False)
        grammar = LaneGrammar(LLMatcher(tokenizer, form, log_level=0, limits=limits), SamplingSpec(), [0], 0)
        assert grammar.accept_tokens("one", [token]) is (limit == 2000 and token == brace)
        assert grammar.problem == problem


@pytest.mark.parametrize(
    ("sampling", "inside", "complete"),
    [
        (SamplingSpec(), [0], [0, 7, 40]),
        (SamplingSpec(stop_token_ids=(9,)), [0], [0, 7, 9, 40]),
        (SamplingSpec(min_tokens=2), [0], [0]),
        (SamplingSpec(ignore_eos=True), [0], [0]),
        (SamplingSpec(ignore_eos=True, stop_token_ids=(9,)), [0], [0, 9]),
    ],
    ids=["plain", "stops", "min_tokens", "ignore_eos", "ignore_eos and stops"],
)
def test_ends_are_allowed_where_the_form_is_complete(
    sampling: SamplingSpec, inside: list[int], complete: list[int]
) -> None:
    """With two ends of text, 7 and 40, of which the matcher knows the first."""
    assert allowed_of(LaneGrammar(Stub(), sampling, [END, 40], END)) == inside
    assert allowed_of(LaneGrammar(Stub(allowed=(0, END)), sampling, [END, 40], END)) == complete


@pytest.mark.parametrize(
    "sampling", [SamplingSpec(), SamplingSpec(min_tokens=8), SamplingSpec(ignore_eos=True)], ids=repr
)
def test_only_the_end_is_left_after_a_complete_form(sampling: SamplingSpec) -> None:
    assert allowed_of(LaneGrammar(Stub(allowed=(END,)), sampling, [END, 40], END)) == [7, 40]


def test_a_real_matcher_says_when_the_form_is_complete(random_pair: pairs.Served) -> None:
    """The back end's own mask names the primary end token, whichever id it has."""
    text = (random_pair.base / "tokenizer.json").read_text()
    setup = Setup(text, 512, 400, any_whitespace=True, seconds=2, memory=1 << 30)
    tokenizer = tokenizer_of(setup)
    matcher = LLMatcher(
        tokenizer,
        grammar_of(StructuredOutputs(choice=("a",)), any_whitespace=True),
        log_level=0,
        limits=parser_limits(),
    )
    grammar = LaneGrammar(matcher, SamplingSpec(), [400], 400)
    masks = torch.zeros(1, 16, dtype=torch.int32)
    (letter,) = tokenizer.tokenize_str("a")
    for expected in (letter, 400):
        grammar.fill_bitmask(masks, 0)
        bits = np.unpackbits(masks[0].numpy().view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits).tolist() == [expected]
        if expected == letter:
            assert grammar.accept_tokens("one", [letter])

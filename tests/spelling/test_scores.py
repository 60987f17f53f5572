"""Scores of foreign tokens against sums over every way to write the text."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.spelling.mass import Mass
from engine.spelling.scores import score_foreign
from engine.spelling.speller import Speller
from engine.spelling.vocabulary import Vocabulary

STOP = 7
TOKENS = ["a", "b", "c", "ab", "bc", "abc", "ca"]


def toy() -> Speller:
    """Seven tokens over three letters, and one that ends the text."""
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(TOKENS)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    assert tokenizer.token_to_id("<end>") == STOP
    return Speller(tokenizer, Vocabulary(tokenizer, stops=[STOP]))


SPELLER = toy()


def model(seed: int, sharp: float) -> Callable[[tuple[int, ...]], np.ndarray]:
    @cache
    def probabilities(tokens: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng(zlib.crc32(bytes(tokens), seed))
        row = np.exp(generator.normal(size=8) * sharp)
        return row / row.sum()

    return probabilities


def begins_with(ask: Callable[[tuple[int, ...]], np.ndarray], text: bytes, tokens: tuple[int, ...] = ()) -> float:
    """Probability that the model's text begins with ``text``, whatever its tokens: all of them are tried."""
    if not text:
        return 1.0
    total = 0.0
    for token, string in enumerate(TOKENS):
        data = string.encode()
        if data.startswith(text):
            total += ask(tokens)[token]
        elif text.startswith(data):
            total += ask(tokens)[token] * begins_with(ask, text[len(data) :], (*tokens, token))
    return total


def scored(text: bytes, pieces: list[bytes], ask: Callable[[tuple[int, ...]], np.ndarray], ends: bool = True):  # type: ignore[no-untyped-def]
    tokens = SPELLER.spell(text)
    return score_foreign(
        SPELLER, text, pieces, ends, lambda place: Mass(SPELLER.vocabulary, ask(tuple(tokens[:place])))
    )


texts = st.text("abc", min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(text=texts, seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 6)))
def test_never_more_than_all_the_ways_to_write_it_and_never_above_one(text: str, seed: int, cuts: set[int]) -> None:
    data, ask = text.encode(), model(seed, 1.0)
    at = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    pieces = [data[a:b] for a, b in pairwise(at)]
    scores = scored(data, pieces, ask)
    assert (scores.logp <= 1e-6).all()
    sums = np.cumsum(scores.logp[:-1])
    for end, total in zip(at[1:], sums, strict=True):
        assert total <= np.log(begins_with(ask, data[:end])) + 1e-5
        if end < len(TOKENS[SPELLER.spell(data)[0]]):
            # Within the first token there is no canonical path yet to leave.
            only = sum(ask(())[token] for token, string in enumerate(TOKENS) if string.encode().startswith(data[:end]))
            assert total == pytest.approx(np.log(only), abs=1e-5)


@given(text=texts, seed=st.integers(0, 1000))
def test_its_own_tokens_have_its_own_probabilities(text: str, seed: int) -> None:
    ask, tokens = model(seed, 1.0), SPELLER.spell(text.encode())
    scores = scored(text.encode(), [TOKENS[token].encode() for token in tokens], ask)
    rows = [ask(tuple(tokens[:place])) for place in range(len(tokens) + 1)]
    expected = [np.log(row[token]) for row, token in zip(rows, [*tokens, STOP], strict=True)]
    np.testing.assert_allclose(scores.logp, expected, atol=1e-5)
    tops = [int(row.argmax()) for row in rows]
    continues = [
        top != STOP and "".join(TOKENS[t] for t in tokens[place:]).startswith(TOKENS[top])
        for place, top in enumerate(tops[:-1])
    ]
    # With nothing but letters to restart at, a position counts as aligned where the next token leaves the end alone.
    assert all(scores.aligned[place] or not scores.right[place] for place in range(len(tokens)))
    assert [bool(r) for r in scores.right] == [
        bool(a and c) for a, c in zip(scores.aligned[:-1], continues, strict=True)
    ] + [tops[-1] == STOP]


def test_a_model_that_writes_one_way_only_has_exact_scores() -> None:
    """A sharp model gives nearly all its probability to one spelling; then nothing is left out."""

    def ask(tokens: tuple[int, ...]) -> np.ndarray:
        row = np.full(8, 1e-9)
        canonical = SPELLER.spell(b"abcab")
        row[canonical[len(tokens)] if len(tokens) < len(canonical) else STOP] = 1.0
        return row / row.sum()

    scores = scored(b"abcab", [b"ab", b"c", b"ab"], ask)
    assert np.exp(scores.logp.sum()) == pytest.approx(begins_with(ask, b"abcab"), rel=1e-4)
    assert scores.right.tolist() == [True, False, True, True]
    assert scores.aligned.tolist() == [True, False, True, True]

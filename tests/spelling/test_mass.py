"""Spans, branches and masses are what going through all tokens one by one gives."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.spelling.mass import END, EXACT, Mass
from engine.spelling.vocabulary import Vocabulary
from tests.server.zoo import byte_level
from tests.spelling.tokenizers_in_use import ALL, tokenizer_of, vocabulary_of

every = pytest.mark.parametrize("name", [name for name in ALL if name != "Tekken"])


@cache
def strings(name: str) -> dict[int, bytes]:
    tokenizer, vocabulary = tokenizer_of(name), vocabulary_of(name)
    tokens = tokenizer.get_vocab(with_added_tokens=True).values()
    return {token: text for token in tokens if (text := vocabulary.bytes_of(token)) is not None}


prefixes = st.one_of(
    st.binary(max_size=3), st.sampled_from([b"", b" ", b" t", b"\xff", b"\xff\xff", b"\xe6\x97", "日".encode(), b"\0"])
)


@every
@settings(max_examples=15, deadline=None)
@given(prefix=prefixes, choice=st.integers(0, 1 << 30), data=st.data())
def test_spans_and_branches(name: str, prefix: bytes, choice: int, data: st.DataObject) -> None:
    vocabulary = vocabulary_of(name)
    if data.draw(st.booleans()):
        token = vocabulary.bytes_of(int(vocabulary.order[choice % len(vocabulary)])) or b""
        prefix = token[: data.draw(st.integers(0, len(token)))]
    table = strings(name)
    begin, end = vocabulary.span(prefix)
    assert sorted(vocabulary.order[begin:end]) == sorted(t for t, text in table.items() if text.startswith(prefix))
    if prefix:
        assert vocabulary.exact(prefix) == tuple(sorted(t for t, text in table.items() if text == prefix))
    branches = vocabulary.branches(prefix)
    assert (branches.begin, branches.end) == (begin, end)
    longer = prefix + data.draw(st.binary(min_size=1, max_size=1))
    assert tuple(branches.bounds[longer[-1] : longer[-1] + 2]) == vocabulary.span(longer)


@pytest.mark.parametrize("name", ["demo pair", "SentencePiece BPE, legacy", "byte-level, added tokens", "Tekken"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), choice=st.integers(0, 1 << 30), data=st.data())
def test_the_few_symbols_that_can_follow_are_those_of_all(
    name: str, seed: int, choice: int, data: st.DataObject
) -> None:
    vocabulary = vocabulary_of(name)
    token = vocabulary.bytes_of(int(vocabulary.order[choice % len(vocabulary)])) or b""
    prefix = token[: data.draw(st.integers(1, max(1, len(token))))] + data.draw(st.sampled_from([b"", b"", b"\xf7"]))
    row = np.random.default_rng(seed).random(max(vocabulary.order) + 1).astype(np.float32)
    mass = Mass(vocabulary, row)
    children = vocabulary.children(prefix)
    dense, symbols = mass.next(prefix), list(children.symbols)
    assert symbols == sorted(symbols) == list(map(int, np.flatnonzero(dense)))
    np.testing.assert_allclose(mass.following(children), dense[symbols], rtol=1e-9)


@pytest.mark.parametrize("name", ["demo pair", "SentencePiece BPE, legacy", "byte-level, added tokens", "Tekken"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30), choice=st.integers(0, 1 << 30), sharp=st.sampled_from([1.0, 10.0, 60.0]))
def test_masses(name: str, seed: int, choice: int, sharp: float) -> None:
    vocabulary = vocabulary_of(name)
    table = strings(name)
    size = max(table) + 9
    scores = np.random.default_rng(seed).normal(size=size) * sharp
    row = np.exp(scores - scores.max())
    row = (row / row.sum()).astype(np.float32)
    total = sum(float(row[token]) for token in table)
    token = vocabulary.bytes_of(int(vocabulary.order[choice % len(vocabulary)])) or b""
    prefix = token[: choice % (len(token) + 1)]
    mass = Mass(vocabulary, row)
    expected = np.zeros(258)
    for token_id, text in table.items():
        if text.startswith(prefix):
            expected[text[len(prefix)] if len(text) > len(prefix) else EXACT] += float(row[token_id]) / total
    got = mass.next(prefix)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-13)
    assert mass.of(prefix) == pytest.approx(expected.sum(), rel=1e-6, abs=1e-13)
    assert mass.at(prefix) == pytest.approx(expected[EXACT], rel=1e-6, abs=1e-13)
    assert got[END] == 0.0


def test_stops_are_one_symbol_and_other_special_tokens_are_none() -> None:
    tokenizer = byte_level(added=True)
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    other = tokenizer.token_to_id("<think>")
    row = np.zeros(tokenizer.get_vocab_size() + 3, np.float32)
    letter = tokenizer.token_to_id("a")
    row[[start, end, other, letter]] = [0.5, 0.1, 0.1, 0.3]
    mass = Mass(Vocabulary(tokenizer, stops=[end, other, 10**6]), row)
    # "<think>" ends this model's texts, so it is no text to it.
    symbols = mass.next(b"")
    assert symbols[END] == pytest.approx(0.4, rel=1e-6)
    assert symbols[ord("a")] == pytest.approx(0.6, rel=1e-6)
    assert symbols.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_row_that_is_no_distribution_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite, or empty"):
        Mass(vocabulary_of("demo pair"), np.full(1024, bad, np.float32))


def test_small_masses_keep_their_digits() -> None:
    vocabulary = vocabulary_of("demo pair")
    row = np.full(1024, 1e-20)
    row[vocabulary.exact(b"a")[0]] = 1.0
    assert Mass(vocabulary, row).of(b"z") == pytest.approx(
        1e-20 * (vocabulary.span(b"z")[1] - vocabulary.span(b"z")[0])
    )

"""Words: where they begin, where they end, and that other tokens of the text are never touched."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from engine.spelling.strand import Strand
from engine.spelling.words import MOST_BYTES, Word, begins_word
from tests.spelling.test_characters import NAMES, SPELLERS, STOP
from tests.spelling.test_speller import texts
from tests.spelling.tokenizers_in_use import speller_of

BYTE_LEVEL, DEMO = "byte-level, added tokens", "demo pair"


def words_of(name: str, text: str) -> list[bytes]:
    """A text word by word, as its canonical tokens give it."""
    tokens, done, words = speller_of(name).spell(text.encode()), b"", []
    while tokens:
        word = Word(speller_of(name), done)
        for token in tokens:
            if not word.add(token):
                break
        tokens = tokens[len(word.tokens) :]
        done += word.text
        words.append(word.text)
    return words


@pytest.mark.parametrize("name", [BYTE_LEVEL, DEMO])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It is so.", ["It", " is", " so", "."]),
        (" one two", [" one", " two"]),
        ("end.\n\nNext one", ["end", ".", "\n\n", "Next", " one"]),
        ("a=1234 b", ["a", "=", "1234", " b"]),
        ("it's fine", ["it's", " fine"]),
    ],
)
def test_words(name: str, text: str, words: list[str]) -> None:
    assert words_of(name, text) == [word.encode() for word in words]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (DEMO, ["1", " +", " ", "12", ".", "5", "%,", " so"]),
        # It has tokens of a space and a digit.
        (BYTE_LEVEL, ["1", " +", " 12", ".", "5", "%,", " so"]),
    ],
)
def test_a_number_is_a_word_without_its_space_where_no_token_joins_them(name: str, words: list[str]) -> None:
    assert words_of(name, "1 + 12.5%, so") == [word.encode() for word in words]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(text=texts)
def test_a_text_is_its_words_and_none_is_endless(name: str, text: str) -> None:
    words = words_of(name, text)
    assert b"".join(words) == text.encode()
    longest = speller_of(name).vocabulary.longest
    # A character that begins within the most is ended.
    assert all(0 < len(word) <= max(MOST_BYTES + 3, longest) for word in words)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(before=texts, word=texts, after=texts)
def test_what_stands_before_a_word_is_not_spelled_anew(name: str, before: str, word: str, after: str) -> None:
    """The promise that streaming rests on: deferring at a word's beginning changes no token before it."""
    speller = speller_of(name)
    strand = Strand(speller)
    strand.follow(before.encode())
    tokens = list(strand.tokens)
    if before and word and list(speller.boundaries.within((before + word).encode(), *[len(before.encode())] * 2)):
        assert begins_word(speller.boundaries, before.encode(), word.encode())
        strand.follow(word.encode())
        strand.follow(after.encode())
        assert strand.tokens[: len(tokens)] == tokens


def test_an_end_and_other_special_tokens_close_a_word() -> None:
    speller = SPELLERS[BYTE_LEVEL]
    word = Word(speller, b"so")
    assert not word.add(STOP)
    assert (word.closed, word.ended, word.tokens) == (True, True, [])
    word = Word(speller, b"so")
    special = next(token for token in range(2000) if speller.vocabulary.bytes_of(token) is None and token != STOP)
    assert word.add(speller.spell(b" it")[0])
    assert not word.add(special)
    assert (word.closed, word.ended) == (True, False)


def test_a_word_has_a_most_length() -> None:
    speller = speller_of(DEMO)
    word = Word(speller, b"", most_bytes=10)
    token = speller.vocabulary.exact(b"a")[0]
    while word.add(token):
        pass
    assert word.text == b"a" * 10

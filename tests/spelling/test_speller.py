"""A text is spelled byte for byte, and anew as if all of it were spelled at once, wherever it was cut."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from engine.spelling.speller import Speller, SpellingError
from engine.spelling.strand import REACH, Strand
from engine.spelling.vocabulary import Vocabulary, VocabularyError, obstacle
from tests.server.zoo import BY_WINDOW, byte_level, zoo
from tests.spelling.tokenizers_in_use import ALL, COMPLETE, LACKING, MORE, speller_of, tokenizer_of, vocabulary_of

AS_THEY_ARE = ("byte-level", "byte-level, added tokens", "SentencePiece BPE, no prefix", "Tekken", "demo pair")
"""Tokenizers that spell the beginning of a text as its middle, and change nothing."""

PARTS = [
    *("Hello", " world", "the", " the", "it's", "don't ", "I'LL", "x=1;", "3.14", "1234567", " 42", "foo_bar(", "->"),
    *(
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        " \n",
        "\u00a0",
        "\u3000",
        ",",
        "!?",
        "…",
        '"',
        "e.g.",
        "http://a.b/c",
    ),
    *("été", "e\u0301", "ﬁ", "日本語", "。", "\uff0c", "русский", "हिन्दी", "▁", "Ġ", "\0", "."),
    *("👩\u200d👩\u200d👧", "🇫🇷", "👍🏽", "😀", "<think>", "<s>", "<|im_end|>", "<0x41>", "##ing", "</w>"),
]
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)
complete = pytest.mark.parametrize("name", COMPLETE)


def test_tokenizers_beside_the_packages_are_used_if_they_are_named() -> None:
    if not os.environ.get(MORE):
        pytest.skip(f"no further real tokenizers: {MORE} names none")
    assert set(os.environ[MORE].split(":")) <= set(ALL)


@complete
@settings(max_examples=20, deadline=None)
@given(text=texts)
def test_bytes_in_are_bytes_out(name: str, text: str) -> None:
    assert obstacle(vocabulary_of(name)) is None
    assert vocabulary_of(name).text_of(speller_of(name).spell(text.encode())) == text.encode()


@pytest.mark.parametrize("name", LACKING)
@settings(max_examples=20, deadline=None)
@given(text=texts)
def test_a_vocabulary_that_lacks_something_says_so_or_keeps_the_bytes(name: str, text: str) -> None:
    assert "no token for the byte" in (obstacle(vocabulary_of(name)) or "")
    with suppress(SpellingError):
        assert vocabulary_of(name).text_of(speller_of(name).spell(text.encode())) == text.encode()


def test_a_vocabulary_may_lack_what_no_text_has() -> None:
    """As SmolLM2's does: some control characters, and bytes that begin only characters not assigned."""
    state = json.loads(byte_level().to_str())
    entries = state["model"]["vocab"]
    bytes_of = {vocabulary_of("byte-level").bytes_of(number): name for name, number in entries.items()}
    for lacking in (b"\x04", b"\xf1"):
        del entries[bytes_of[lacking]]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    vocabulary = Vocabulary(tokenizer)
    assert obstacle(vocabulary) is None
    with pytest.raises(SpellingError, match="x04"):
        Speller(tokenizer, vocabulary).spell(b"a\x04b")
    del entries[bytes_of[b"~"]]
    assert "0x7E" in (obstacle(Vocabulary(Tokenizer.from_str(json.dumps(state)))) or "")


@complete
@settings(max_examples=20, deadline=None)
@given(
    data=st.binary(max_size=20)
    | st.tuples(texts, st.binary(max_size=3), texts).map(lambda parts: parts[0].encode() + parts[1] + parts[2].encode())
)
def test_bytes_that_are_no_text_are_spelled_where_there_are_tokens_for_them(name: str, data: bytes) -> None:
    vocabulary = vocabulary_of(name)
    if all(vocabulary.exact(bytes([byte])) for byte in data):
        assert vocabulary.text_of(speller_of(name).spell(data)) == data


@pytest.mark.parametrize("name", AS_THEY_ARE)
@settings(max_examples=20, deadline=None)
@given(text=texts)
def test_the_spelling_is_the_tokenizers_own(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    special = {token for token, entry in tokenizer.get_added_tokens_decoder().items() if entry.special}
    # A literal "▁" becomes a space in SentencePiece: that is a change, and ours keeps the bytes.
    if special.isdisjoint(tokens) and vocabulary_of(name).text_of(tokens) == text.encode():
        assert speller_of(name).spell(text.encode()) == tokens


def grown(name: str, *parts: bytes) -> Strand:
    strand = Strand(speller_of(name))
    for part in parts:
        strand.follow(part)
    return strand


@complete
@settings(max_examples=20, deadline=None)
@given(text=texts, data=st.data())
@example(text="a  b", data=None)
@example(text="12345", data=None)
@example(text="it's", data=None)
@example(text="done.\n\nNext", data=None)
@example(text="so <think> so", data=None)
@example(text="👩\u200d👩\u200d👧", data=None)
def test_spelled_in_parts_it_is_as_spelled_at_once(name: str, text: str, data: st.DataObject | None) -> None:
    whole = text.encode()
    if data is None:
        cuts = [[cut] for cut in range(len(whole))]
    else:
        cuts = [sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))]
    for cut in cuts:
        at = [0, *cut, len(whole)]
        strand = grown(name, *(whole[begin:end] for begin, end in pairwise(at)))
        assert strand.tokens == speller_of(name).spell(whole)
        assert strand.end == len(whole)
        assert bytes(strand.text) == whole


@complete
@settings(max_examples=20, deadline=None)
@given(before=texts, after=texts)
def test_a_position_is_aligned_where_the_whole_has_a_boundary(name: str, before: str, after: str) -> None:
    strand = grown(name, before.encode())
    vocabulary, ends, end = vocabulary_of(name), {0}, 0
    for token in speller_of(name).spell((before + after).encode()):
        end += len(vocabulary.bytes_of(token) or b"")
        ends.add(end)
    assert strand.aligned(after.encode()) == (len(before.encode()) in ends)


@complete
@settings(max_examples=20, deadline=None)
@given(text=texts, tokens=st.lists(st.integers(0, 1 << 30), max_size=40), since=st.integers(0, 1 << 30))
def test_a_restart_is_at_the_last_boundary_where_a_token_ends(
    name: str, text: str, tokens: list[int], since: int
) -> None:
    boundaries, vocabulary = speller_of(name).boundaries, vocabulary_of(name)
    own = [int(vocabulary.order[token % len(vocabulary)]) for token in tokens]
    strand = grown(name, text.encode())
    strand.follow(vocabulary.text_of(own), own)
    whole = bytes(strand.text)
    since = since % (len(whole) + 1)
    safe = list(boundaries.within(whole, 1, len(whole)))
    assert safe == [offset for offset in range(len(whole) + 1) if boundaries.at(whole, offset)]
    ends = [offset for offset in safe if offset in strand.ends and since - REACH <= offset <= since]
    assert strand._boundary(whole, since, 0) == max(ends, default=None)


def test_a_spelling_that_is_kept_is_not_changed_by_who_gets_it() -> None:
    speller = speller_of("demo pair")
    tokens = speller.spell(b"Liberia")
    assert tokens == speller.spell(b"Liberia") is not tokens
    tokens.clear()
    assert speller.spell(b"Liberia")


@complete
@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), texts, st.integers(0, 1 << 30)), max_size=8))
def test_a_lane_holds_the_strand_whoever_writes(name: str, steps: list[tuple[bool, str, int]]) -> None:
    """Own tokens are any tokens, canonical or not; what is settled never changes."""
    vocabulary, strand = vocabulary_of(name), Strand(speller_of(name))
    lane: list[int] = []
    common, settled = b"", []
    for is_own, text, choice in steps:
        own = [int(vocabulary.order[choice % len(vocabulary)])] if is_own else []
        part = vocabulary.text_of(own) if is_own else text.encode()
        try:
            strand.follow(part, own)
        except SpellingError:
            return  # no token for a byte that occurs in no text
        common += part
        keep, tokens = strand.plan()
        assert tokens or keep == len(lane)
        lane[keep:] = tokens
        strand.tell()
        assert lane == strand.tokens
        assert strand.plan() == (len(lane), [])
        assert vocabulary.text_of(lane) + strand.pending == common == bytes(strand.text)
        assert lane[: len(settled)] == settled
        settled = lane[: strand.settled()]
        if own and not strand.pending:
            assert lane[-1:] == own


def test_own_tokens_stay_until_others_touch_their_word() -> None:
    name = "demo pair"
    vocabulary, strand = vocabulary_of(name), Strand(speller_of(name))
    letters = [vocabulary.exact(bytes([byte]))[0] for byte in b"the the"]
    strand.follow(b"the the", letters)
    strand.tell()
    assert strand.tokens == letters != speller_of(name).spell(b"the the")
    strand.follow(b" the")
    assert strand.tokens == letters + speller_of(name).spell(b" the")
    strand.follow(b"se")
    assert strand.tokens == letters + speller_of(name).spell(b" these")
    assert strand.plan() == (len(letters), speller_of(name).spell(b" these"))


def test_a_character_in_two_parts_is_pending_where_there_are_no_bytes() -> None:
    strand = grown("Unigram", b"was")
    before = list(strand.tokens)
    strand.tell()
    strand.follow("é".encode()[:1])
    assert (strand.tokens, strand.pending) == (before, "é".encode()[:1])
    assert strand.plan() == (len(before), [])
    assert not strand.aligned(b"x")


def test_a_text_that_looks_like_a_special_token_is_text() -> None:
    tokenizer = byte_level(added=True)
    vocabulary = Vocabulary(tokenizer)
    end = tokenizer.token_to_id("<|im_end|>")
    assert vocabulary.bytes_of(end) is None
    tokens = Speller(tokenizer, vocabulary).spell(b"a<|im_end|>b<think>")
    assert end not in tokens
    assert tokenizer.token_to_id("<think>") in tokens


def test_an_added_token_that_eats_spaces_does_not_change_the_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.text_of(Speller(tokenizer, vocabulary).spell(b"a  <mask>  b <mask>")) == b"a  <mask>  b <mask>"


def test_ids_that_the_model_has_no_output_for_are_not_used() -> None:
    tokenizer = byte_level(added=True)
    added = tokenizer.token_to_id("<think>")
    vocabulary = Vocabulary(tokenizer, size=added)
    tokens = Speller(tokenizer, vocabulary).spell(b"so <think> so")
    assert max(tokens) < added
    assert vocabulary.text_of(tokens) == b"so <think> so"


@pytest.mark.parametrize("name", BY_WINDOW)
def test_tokens_that_are_no_byte_strings_are_refused(name: str) -> None:
    with pytest.raises(VocabularyError, match="bytes of its own"):
        Vocabulary(zoo(name))


@pytest.mark.parametrize("name", ["SentencePiece BPE, legacy", "Tekken", "Mistral 7B"])
@pytest.mark.parametrize("unit", ["abcdefghij" * 3, "日本語русский", "0123456789", "\n \n"])
def test_a_text_without_boundaries_costs_no_more_with_its_length(name: str, unit: str) -> None:
    strand = Strand(speller_of(name))
    spelled = 0
    original = speller_of(name).spell_begun

    def counting(text: bytes) -> tuple[list[int], bytes]:
        nonlocal spelled
        spelled += len(text)
        return original(text)

    strand.speller.spell_begun = counting  # type: ignore[method-assign]
    try:
        text = (unit * 400).encode()[:6000]
        costs = []
        for begin in range(0, len(text), 7):
            spelled = 0
            strand.follow(text[begin : begin + 7])
            costs.append(spelled)
    finally:
        del strand.speller.spell_begun
    assert vocabulary_of(name).text_of(strand.tokens) + strand.pending == text
    assert max(costs) <= 6 * REACH
    # And it is spelled as it should be, but for a seam here and there.
    assert len(strand.tokens) <= 1.05 * len(speller_of(name).spell(text)) + 2

"""Stop strings and incremental text, against brute force on the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.types import Delta
from server.text.detokenize import TableDetokenizer, WindowDetokenizer
from server.text.pieces import Piece, PieceBuilder
from server.text.stop import StopMatcher
from server.text.tokenizer import TextTokenizer
from tests.server.fakes import byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
TOKENIZER = TextTokenizer(BYTE_LEVEL)
VOCABULARY = TOKENIZER.vocab_size


class Words:
    """A detokenizer whose tokens are the items of a list: any split of any text."""

    def __init__(self, parts: list[str]) -> None:
        self._parts = parts

    def push(self, token: int) -> str:
        return self._parts[token]

    def flush(self) -> str:
        return ""

    def lead(self, token: int, text: str, *, final: bool) -> int:
        return 0


def brute_force(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that counts: of all occurrences the first to end, the longest of those."""
    found = [(start + len(stop), start) for stop in stops for start in range(len(text)) if text.startswith(stop, start)]
    if not found:
        return None
    end, start = min(found)
    return start, end


def run(builder: PieceBuilder, tokens: list[int], per_delta: int) -> list[Piece]:
    pieces = []
    for start in range(0, len(tokens), per_delta):
        chunk = tokens[start : start + per_delta]
        final = start + per_delta >= len(tokens)
        delta = Delta("r", chunk, [0] * len(chunk), [0.5] * len(chunk), finish_reason="length" if final else None)
        piece = builder.feed(delta)
        if piece is not None:
            pieces.append(piece)
        if builder.finished:
            break
    return pieces


def check_pieces(pieces: list[Piece]) -> str:
    """The invariants of pieces; returns the whole text."""
    offset = 0
    for piece in pieces:
        assert piece.text == "".join(piece.token_texts)
        assert len(piece.tokens) == len(piece.sources) == len(piece.deferrals) == len(piece.token_texts)
        assert len(piece.offsets) == len(piece.tokens)
        for begin, text in zip(piece.offsets, piece.token_texts, strict=True):
            assert begin == offset or (text.startswith("\ufffd") and offset < begin <= offset + len(text))
            offset += len(text)
    assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return "".join(piece.text for piece in pieces)


small = st.text(alphabet="ab\n", max_size=40)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


@given(
    parts=st.lists(st.text(alphabet="ab\n", max_size=4), min_size=1, max_size=20),
    stop=stops,
    per_delta=st.integers(1, 5),
    include=st.booleans(),
)
def test_any_split_finds_what_brute_force_finds(
    parts: list[str], stop: list[str], per_delta: int, include: bool
) -> None:
    text = "".join(parts)
    pieces = run(PieceBuilder(Words(parts), stop=stop, include_stop=include), list(range(len(parts))), per_delta)
    expected = brute_force(text, stop)
    if expected is None:
        assert check_pieces(pieces) == text
        assert pieces[-1].finish_reason == "length"
        return
    start, end = expected
    assert check_pieces(pieces) == text[: end if include else start]
    assert pieces[-1].finish_reason == "stop"
    # The token that completed the stop string is the last one that counts.
    counted = sum(len(piece.tokens) for piece in pieces)
    assert len("".join(parts[: counted - 1])) < end <= len("".join(parts[:counted]))


@given(text=small, stop=stops)
def test_matcher_holds_back_no_more_than_it_must(text: str, stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    for end in range(1, len(text) + 1):
        if matcher.feed(text[end - 1]) is not None:
            break
        so_far = text[:end]
        needed = max(
            (n for s in stop for n in range(1, len(s)) if so_far.endswith(s[:n])),
            default=0,
        )
        assert matcher.held == needed


@given(text=small, stop=stops, unarmed=st.integers(0, 40))
def test_stop_strings_completed_before_min_tokens_do_not_count(text: str, stop: list[str], unarmed: int) -> None:
    found = [
        (start + len(s), start)
        for s in stop
        for start in range(len(text))
        if text.startswith(s, start) and start + len(s) >= unarmed
    ]
    parts = list(text) or [""]
    pieces = run(PieceBuilder(Words(parts), stop=stop, min_tokens=unarmed), list(range(len(parts))), 1)
    assert check_pieces(pieces) == (text[: min(found)[1]] if found else text)


@given(tokens=st.lists(st.integers(0, VOCABULARY + 20), min_size=1, max_size=30), per_delta=st.integers(1, 7))
def test_streamed_text_is_the_decoded_text(tokens: list[int], per_delta: int) -> None:
    """Whatever tokens: special ones, ids beyond the tokenizer, bytes that are no UTF-8."""
    pieces = run(PieceBuilder(TOKENIZER.detokenizer(), stop=[]), tokens, per_delta)
    assert check_pieces(pieces) == TOKENIZER.decode(tokens)


@given(
    text=st.text(max_size=30), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2), per_delta=st.integers(1, 4)
)
def test_split_characters_never_show_as_replacements(text: str, stop: list[str], per_delta: int) -> None:
    raw = byte_level_tokenizer_ids(text) or [0]
    pieces = run(PieceBuilder(TOKENIZER.detokenizer(), stop=stop), raw, per_delta)
    expected = brute_force(text, stop)
    assert check_pieces(pieces) == (text if expected is None else text[: expected[0]])
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece.text for piece in pieces)


def byte_level_tokenizer_ids(text: str) -> list[int]:
    """One token a byte: every character beyond ASCII is split."""
    by_byte = {TOKENIZER.token_bytes(token): token for token in range(2, VOCABULARY)}
    return [by_byte[bytes([byte])] for byte in text.encode()]


@given(text=st.text(max_size=30))
def test_the_general_detokenizer_agrees_with_the_fast_one(text: str) -> None:
    slow, fast = WindowDetokenizer(BYTE_LEVEL.decode), TOKENIZER.detokenizer()
    assert isinstance(fast, TableDetokenizer)
    tokens = byte_level_tokenizer_ids(text)
    assert "".join(map(slow.push, tokens)) + slow.flush() == "".join(map(fast.push, tokens)) + fast.flush() == text


def test_an_incomplete_character_is_flushed_at_the_end() -> None:
    tokens = byte_level_tokenizer_ids("a日")[:-1]
    for detokenizer in (TOKENIZER.detokenizer(), WindowDetokenizer(BYTE_LEVEL.decode)):
        pieces = run(PieceBuilder(detokenizer, stop=[]), tokens, 1)
        assert [piece.text for piece in pieces] == ["a", "\ufffd"]
        assert check_pieces(pieces) == TOKENIZER.decode(tokens)


def test_tokens_are_held_with_their_text() -> None:
    builder = PieceBuilder(Words(["one ", "EN", "D", "x"]), stop=["END!"])
    first = builder.feed(Delta("r", [0], [0], [None]))
    assert first is not None
    assert first.tokens == [0]
    assert builder.feed(Delta("r", [1], [0], [None])) is None
    assert builder.feed(Delta("r", [2], [1], [None])) is None
    rest = builder.feed(Delta("r", [3], [0], [None], finish_reason="length"))
    assert rest is not None
    assert (rest.text, rest.tokens, rest.sources) == ("ENDx", [1, 2, 3], [0, 1, 0])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_counted_and_shown_on_request(include: bool) -> None:
    builder = PieceBuilder(Words(["a", "b"]), stop=[], include_stop=include)
    piece = builder.feed(Delta("r", [0, 1], [0, 0], [None, None], finish_reason="stop", stop_token=1))
    assert piece is not None
    assert piece.text == ("ab" if include else "a")
    assert piece.tokens == [0, 1]
    assert piece.finish_reason == "stop"


def test_a_final_delta_without_tokens_releases_what_was_held() -> None:
    builder = PieceBuilder(TOKENIZER.detokenizer(), stop=["yz"])
    tokens = byte_level_tokenizer_ids("xy日")[:-1]
    assert builder.feed(Delta("r", tokens[:2], [0, 0], [None] * 2)) is not None
    assert builder.feed(Delta("r", tokens[2:], [0] * 2, [None] * 2)) is None
    piece = builder.feed(Delta("r", finish_reason="stop"))
    assert piece is not None
    assert piece.text == "".join(piece.token_texts) == "y\ufffd"
    assert piece.tokens == tokens[1:]

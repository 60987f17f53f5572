"""Where the tokens of an echoed prompt stand in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, processors

from server.text.echo import EchoedPrompt, echoed
from server.text.tokenizer import TextTokenizer
from tests.server.fakes import EOS, byte_level_tokenizer
from tests.server.test_tokenize import sentencepiece_like


def with_edges(**how: bool) -> Tokenizer:
    """A byte-level tokenizer that puts a token before every text, and has one that takes white space along."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<mask>", **how)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A <|user|>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (EOS, "<|user|>")],
    )
    return tokenizer


def echo(tokenizer: TextTokenizer, text: str) -> EchoedPrompt:
    return echoed(tokenizer, text, tokenizer._encode(text, True))


PLAIN = TextTokenizer(byte_level_tokenizer())


@given(st.lists(st.sampled_from([EOS, "<|user|>", " ", "Hello", " world", "é", "日", "😀", "\n\n", "<|"]), min_size=1))
def test_every_token_stands_where_it_is_said_to(parts: list[str]) -> None:
    text = "".join(parts)
    prompt = echo(PLAIN, text)
    assert prompt.text == text
    before = 0
    for token, offset in zip(prompt.tokens, prompt.offsets, strict=True):
        # The whole characters before it: one that it only goes on with is not over.
        assert offset == len(text.encode()[:before].decode(errors="ignore"))
        before += len(PLAIN.token_bytes(token))
    assert before == len(text.encode())


@pytest.mark.parametrize("how", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_white_space_that_a_special_token_takes_along(how: dict[str, bool]) -> None:
    tokenizer = TextTokenizer(with_edges(**how))
    text = "Hello  <mask>  there <mask> you"
    prompt = echo(tokenizer, text)
    begin, *inner, end = zip(prompt.tokens, prompt.offsets, strict=True)
    # What the tokenizer adds is not in the text.
    assert begin[1] == 0
    assert end[1] == len(text)
    for token, offset in inner:
        assert text[offset:].startswith(tokenizer.token_text(token)), (tokenizer.token_text(token), offset)


def test_the_text_has_the_token_that_the_tokenizer_adds() -> None:
    tokenizer = TextTokenizer(with_edges())
    prompt = echo(tokenizer, f"a{EOS}b")
    assert prompt.offsets == [0, 0, 1, 1 + len(EOS), 2 + len(EOS)]


def test_a_text_that_is_normalised_has_offsets_within_it() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.NFKD()
    text = "ﬁé" * 10
    prompt = echo(TextTokenizer(tokenizer), text)
    assert prompt.offsets == sorted(prompt.offsets)
    assert all(0 <= offset <= len(text) for offset in prompt.offsets)


def test_another_kind_of_vocabulary() -> None:
    tokenizer = TextTokenizer(sentencepiece_like())
    text = "日 wor!"
    prompt = echo(tokenizer, text)
    assert prompt.offsets == sorted(prompt.offsets)
    assert text[prompt.offsets[-1] :] == "!"

"""Prompt and text together are what decoding prompt and answer together gives, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from itertools import chain
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.spelling.decoding import BYTEWISE
from server.app import create_app
from server.service import Service
from server.text.detokenize import TableDetokenizer, WindowDetokenizer
from server.text.echo import echoed
from server.text.tokenizer import TextTokenizer
from tests.server.conftest import House
from tests.server.fakes import FakeEngine, events, settings, writes
from tests.server.zoo import BUILDERS, BY_WINDOW, byte_level, mistral_model, zoo

BY_BYTES = [name for name in BUILDERS if "SentencePiece" in name or "fallback" in name or "Mistral" in name]
every_tokenizer = pytest.mark.parametrize("name", list(BUILDERS))
texts = st.lists(
    st.sampled_from(
        [
            "Hello",
            " world",
            " ",
            "  ",
            "\n",
            "the",
            " the",
            "été",
            "日本",
            "😀",
            " 's",
            " n't",
            " .",
            "▁",
            "naïve",
            "<think>",
        ]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@cache
def tokenizer_of(name: str) -> TextTokenizer:
    return TextTokenizer(zoo(name))


@cache
def byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Token ids of single bytes, by byte."""
    found = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {byte: token for byte, token in found.items() if token is not None}


def library(name: str, tokens: list[int]) -> str:
    text: str = zoo(name).decode(tokens, skip_special_tokens=True)
    return text


def prompt_and_text(tokenizer: TextTokenizer, tokens: list[int], cut: int) -> str:
    """Of a prompt and an answer that are ``tokens`` together, the prompt as echo shows it and the text as it comes."""
    prompt, answer = tokens[:cut], tokens[cut:]
    begin = echoed(tokenizer, prompt, prompt).text if prompt else ""
    detokenizer = tokenizer.detokenizer(prompt)
    return begin + "".join(map(detokenizer.push, answer)) + detokenizer.flush()


@every_tokenizer
@given(text=texts, cut=st.integers(0, 40))
def test_prompt_and_text_are_the_decoded_whole(name: str, text: str, cut: int) -> None:
    tokenizer = tokenizer_of(name)
    tokens = tokenizer._encode(text, True)
    assert prompt_and_text(tokenizer, tokens, cut) == library(name, tokens) == tokenizer.decode(tokens)


@every_tokenizer
@given(data=st.data(), cut=st.integers(0, 12))
def test_the_same_for_any_tokens(name: str, data: st.DataObject, cut: int) -> None:
    """A model writes tokens in any order, also such as no text becomes; here its bytes are characters at least."""
    raw = zoo(name)
    units = (
        st.integers(0, raw.get_vocab_size() + 3)
        .filter(lambda token: token not in byte_tokens(raw).values())
        .map(lambda token: [token])
    )
    if byte_tokens(raw):
        units |= st.sampled_from("é日😀").map(lambda char: [byte_tokens(raw)[byte] for byte in char.encode()])
    tokens = list(chain.from_iterable(data.draw(st.lists(units, max_size=12))))
    tokenizer = tokenizer_of(name)
    assert prompt_and_text(tokenizer, tokens, cut) == library(name, tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", BY_BYTES)
@given(data=st.data(), cut=st.integers(0, 8))
def test_bytes_that_are_no_text_spoil_no_text(name: str, data: st.DataObject, cut: int) -> None:
    """The library shows a run of byte tokens as U+FFFD from end to end if any of it is no text; here its text stays."""
    raw = zoo(name)
    values = data.draw(st.lists(st.sampled_from("aé日".encode()), min_size=1, max_size=8))
    tokens = [byte_tokens(raw)[value] for value in values]
    text = bytes(values).decode("utf-8", BYTEWISE)
    tokenizer = tokenizer_of(name)
    # The beginning of a text is another matter.
    tokens = [*tokenizer._encode("x", False), *tokens]
    assert prompt_and_text(tokenizer, tokens, cut).removeprefix(tokenizer.decode(tokens[: -len(values)])) == text


@every_tokenizer
def test_which_need_a_window_of_tokens(name: str) -> None:
    expected = WindowDetokenizer if name in BY_WINDOW else TableDetokenizer
    assert isinstance(tokenizer_of(name).detokenizer(), expected)


def test_sentencepiece_itself_agrees() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model()))
    tokenizer = tokenizer_of("Mistral 7B")
    for text in ("Hello world", " two  spaces ", "def f(x):\n\treturn x\n", "été 日本語 😀", "<s> is text here"):
        tokens = model.encode(text)
        assert tokenizer.decode(tokens) == model.decode(tokens) == text
        for cut in range(len(tokens) + 1):
            assert prompt_and_text(tokenizer, tokens, cut) == text


def test_an_added_token_outside_of_ascii_is_what_it_says() -> None:
    """The library reads its characters as bytes of the byte-level alphabet, and shows U+FFFD."""
    raw = byte_level()
    raw.add_tokens(["naïve"])
    tokenizer = TextTokenizer(raw)
    assert tokenizer.decode(tokenizer._encode("so naïve", False)) == "so naïve"


def test_special_tokens_are_shown_on_demand() -> None:
    for name in ("byte-level, added tokens", "SentencePiece BPE, legacy", "Unigram", "WordPiece", "words"):
        tokens = tokenizer_of(name)._encode("the fox", True)
        tokens += [zoo(name).token_to_id(mark) for mark in ("</s>", "<|im_start|>") if zoo(name).token_to_id(mark)]
        shown = tokenizer_of(name).decode(tokens, skip_special_tokens=False)
        assert shown == zoo(name).decode(tokens, skip_special_tokens=False)
        assert shown != tokenizer_of(name).decode(tokens)


@asynccontextmanager
async def serving(name: str, answer: list[int]) -> AsyncIterator[House]:
    """A server whose engine writes these tokens, cut to max_tokens."""
    service = Service(settings(), tokenizer_of(name))
    engine = FakeEngine(writes(answer))
    engine.info = msgspec.structs.replace(engine.info, vocab_size=zoo(name).get_vocab_size())
    service.attach(engine)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://house") as http:
        yield House(http, engine, service)


TEXT = "Hello there, the lazy dog and the fox jumps"


@every_tokenizer
async def test_over_http(name: str) -> None:
    """Whole and streamed, with echo, logprobs' offsets and a stop string that begins with a space."""
    tokens = tokenizer_of(name)._encode(TEXT, True)
    whole = library(name, tokens)
    cut = next(i for i in range(3, len(tokens)) if whole.startswith(" ", len(library(name, tokens[:i]))))
    prompt, answer = tokens[:cut], tokens[cut:]
    begin = library(name, prompt)
    async with serving(name, answer) as house:
        for given, shown in ((prompt, begin), (whole[: len(begin)], begin)):
            fields: dict[str, Any] = {"prompt": given, "max_tokens": len(answer), "logprobs": 1}
            (alone,) = (await house.complete(**fields)).json()["choices"]
            assert shown + alone["text"] == whole
            (echo,) = (await house.complete(**fields, echo=True)).json()["choices"]
            assert echo["text"] == whole
            check_offsets(name, echo)
            *chunks, done = events((await house.complete(**fields, echo=True, stream=True)).text)
            assert done == "[DONE]"
            streamed = [chunk["choices"][0] for chunk in chunks]
            assert "".join(choice["text"] for choice in streamed) == whole
            assert [offset for choice in streamed for offset in choice["logprobs"]["text_offset"]] == echo["logprobs"][
                "text_offset"
            ]
            (only,) = (await house.complete(**{**fields, "max_tokens": 0}, echo=True)).json()["choices"]
            assert only["text"] == shown
            for stream in (False, True):
                response = await house.complete(**{**fields, "logprobs": None}, stop=" fox", stream=stream)
                parts = events(response.text)[:-1] if stream else [response.json()]
                text = "".join(part["choices"][0]["text"] for part in parts)
                assert shown + text == whole[: whole.index(" fox")]
                assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def check_offsets(name: str, choice: dict[str, Any]) -> None:
    """Each token's text stands where it is said to, but for the space before a text's first word."""
    logprobs, text = choice["logprobs"], choice["text"]
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        if token in ("<s>", "<unk>") or token.startswith("bytes:"):
            continue
        if name in BY_WINDOW:
            # What these show of a token has no space before it.
            assert text[offset:].lstrip().startswith(token.removesuffix("</w>"))
        else:
            assert text.startswith((token, token.lstrip()) if offset == 0 else token, offset), (token, offset, text)


async def test_an_answer_finishes_the_character_that_its_prompt_began() -> None:
    name = "SentencePiece BPE, legacy"
    tokens = [*tokenizer_of(name)._encode("the", True), *(byte_tokens(zoo(name))[byte] for byte in "日".encode())]
    async with serving(name, tokens[-1:]) as house:
        fields: dict[str, Any] = {"prompt": tokens[:-1], "echo": True}
        assert (await house.complete(**fields)).json()["choices"][0]["text"] == "the日"
        # Without an answer it stays a beginning.
        assert (await house.complete(**fields, max_tokens=0)).json()["choices"][0]["text"] == "the\ufffd\ufffd"

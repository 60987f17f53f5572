"""vLLM's request fields on real lanes, through the SDK: what they mean holds whoever writes the token.

Modelled on what vLLM's own tests of its OpenAI server check of these fields.
"""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types import CompletionChoice

from tests.live import LiveServer

MODEL = "collm-demo"
PROMPT = "Question: Which currency codes does Iceland Krona have?\nAnswer:"
MIXED: dict[str, Any] = {"policy": "random", "rate": 0.5, "report": True}
"""A collaboration in which both models write, whatever the text."""


def _ask(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> CompletionChoice:
    known = {
        name: fields.pop(name) for name in ("n", "logprobs", "echo", "stop", "seed", "max_tokens") if name in fields
    }
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, **known}
    return client.completions.create(model=MODEL, prompt=prompt, extra_body=fields, **options).choices[0]


def _tokens(demo: LiveServer, text: str, *, special: bool = False) -> list[int]:
    body = {"prompt": text, "add_special_tokens": special}
    return list(httpx.post(f"{demo.url}/tokenize", json=body).json()["tokens"])


def test_allowed_tokens_bind_both_models(client: openai.OpenAI, demo: LiveServer) -> None:
    allowed = sorted({*_tokens(demo, " The currency code is ISK 352."), *_tokens(demo, "0123456789")})
    choice = _ask(
        client, allowed_token_ids=allowed, return_token_ids=True, ignore_eos=True, collaboration=MIXED, seed=1
    )
    assert set(choice.token_ids) <= set(allowed)  # type: ignore[attr-defined]
    sources = set(choice.collaboration["sources"])  # type: ignore[attr-defined]
    assert "base" in sources
    assert len(sources) > 1


def _contains(tokens: list[int], word: list[int]) -> bool:
    return any(tokens[start : start + len(word)] == word for start in range(len(tokens)))


def test_bad_words_bind_both_models(client: openai.OpenAI, demo: LiveServer) -> None:
    """What is forbidden is the word's tokens, as in vLLM: letters in other tokens may spell it."""
    plain = _ask(client, collaboration={"report": True})
    assert "ISK" in plain.text
    assert " currency" in plain.text
    by_experts = [
        token.strip()
        for token, source in zip(*(plain.collaboration[key] for key in ("tokens", "sources")), strict=True)  # type: ignore[attr-defined]
        if source != "base" and token.strip()
    ]
    for words in (["ISK"], ["currency"], by_experts[:2]):
        choice = _ask(client, bad_words=words, return_token_ids=True)
        assert choice.text != plain.text
        for word in words:
            assert not _contains(choice.token_ids, _tokens(demo, word))  # type: ignore[attr-defined]


def test_prompt_logprobs_are_those_of_echo(client: openai.OpenAI) -> None:
    choice = _ask(client, echo=True, logprobs=3, prompt_logprobs=3, max_tokens=2)
    shown: Any = choice.prompt_logprobs  # type: ignore[attr-defined]
    assert shown[0] is None
    assert choice.logprobs is not None
    for number, entry in enumerate(shown[1:], 1):
        own = [each for each in entry.values() if each["decoded_token"] == choice.logprobs.tokens[number]]
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[number] in [each["logprob"] for each in own]
        ranks = sorted(each["rank"] for each in entry.values())
        assert ranks[:3] == [1, 2, 3]
        assert len(entry) in (3, 4)
        by_rank = sorted(entry.values(), key=lambda each: each["rank"])
        assert [each["logprob"] for each in by_rank] == sorted((e["logprob"] for e in entry.values()), reverse=True)


def test_twenty_logprobs(client: openai.OpenAI) -> None:
    choice = _ask(client, logprobs=20, max_tokens=5, return_tokens_as_token_ids=True)
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    assert all(len(top) in (20, 21) for top in choice.logprobs.top_logprobs)
    assert all(token.startswith("token_id:") for token in choice.logprobs.tokens or [])


def test_special_tokens_are_shown_on_request(client: openai.OpenAI) -> None:
    """The end of a text is a special token: with ``ignore_eos`` it is in the middle."""
    hidden, shown = (
        _ask(client, ignore_eos=True, max_tokens=40, skip_special_tokens=skip, return_token_ids=True)
        for skip in (True, False)
    )
    assert hidden.token_ids == shown.token_ids  # type: ignore[attr-defined]
    assert len(shown.text) > len(hidden.text)
    assert shown.text.startswith(hidden.text[:20])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_truncated_prompt_is_the_shorter_prompt(client: openai.OpenAI, demo: LiveServer, side: str) -> None:
    tokens = _tokens(demo, PROMPT, special=True)
    cut = _ask(client, truncate_prompt_tokens=9, truncation_side=side, return_token_ids=True)
    kept = tokens[-9:] if side == "left" else tokens[:9]
    assert cut.prompt_token_ids == kept  # type: ignore[attr-defined]
    assert cut.text == _ask(client, kept).text


def test_salts_change_nothing_but_the_cache(client: openai.OpenAI) -> None:
    assert len({_ask(client, PROMPT * 4, cache_salt=salt).text for salt in ("one", "two", "one", None)}) == 1


def test_a_message_is_continued(client: openai.OpenAI) -> None:
    """The rest of an answer, after its beginning, is what stands there in the whole answer."""
    question = {"role": "user", "content": "Which currency codes does Iceland Krona have?"}

    def ask(messages: Any, **fields: Any) -> str:
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, extra_body=fields)
        return answer.choices[0].message.content or ""

    whole = ask([question])
    assert "ISK" in whole
    begun = whole[: whole.index(" is ISK")]
    rest = ask(
        [question, {"role": "assistant", "content": begun}], continue_final_message=True, add_generation_prompt=False
    )
    assert begun + rest == whole

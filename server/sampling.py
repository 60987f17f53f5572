"""Request fields become the engine's sampling parameters; what needs the vocabulary is checked here."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import msgspec

from engine import draws
from engine.types import EngineInfo, SamplingSpec
from server.errors import invalid, shown
from server.protocol.common import GenerationFields
from server.text.tokenizer import TextTokenizer


def sampling_of(body: GenerationFields, info: EngineInfo, lane: int, **more: Any) -> SamplingSpec:
    """Sampling parameters that all choices of a request share.

    Args:
        body: the request.
        info: the engine's vocabularies.
        lane: whose token ids the request names.
        more: parameters that are named differently in completions and chat.

    Raises:
        ApiError: 400, naming the field.
    """
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "seed": body.seed,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "cache_salt": body.cache_salt,
        "structured_outputs": body.grammar,
        **more,
    }
    vocab_size = info.lane_vocab_size(lane)
    stop_token_ids = _in_vocabulary(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    return SamplingSpec(
        top_k=max(body.top_k or 0, 0),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        stop_token_ids=stop_token_ids,
        allowed_token_ids=_allowed(body, vocab_size, {*stop_token_ids, *info.lane_ends(lane)}),
        **{name: value for name, value in given.items() if value is not None},
    )


def for_choice(sampling: SamplingSpec, index: int, max_tokens: int) -> SamplingSpec:
    """The parameters of a prompt's choice ``index``.

    Choice 0 keeps the seed itself, so that asking for more choices does not change the first one, and neither do
    other prompts in the same request.
    """
    seed = sampling.seed if sampling.seed is None or index == 0 else derived_seed(sampling.seed, index)
    return msgspec.structs.replace(sampling, seed=seed, max_tokens=max_tokens)


def derived_seed(seed: int, index: int) -> int:
    """A non-negative int64 that depends on both arguments in every bit."""
    return draws.mix(seed + (index - 1) * draws.GOLDEN_RATIO) >> 1


async def bad_words_of(body: GenerationFields, tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences that stand for a request's bad words: each word at the beginning of a text, and after a space
    where that gives another first token and as many of them, as vLLM does.

    Raises:
        ApiError: 400, a word that has no tokens.
    """
    words = list(dict.fromkeys(word.lstrip() for word in body.bad_words or ()))
    if not words:
        return ()
    texts = [f"{space}{word}" for word in words for space in ("", " ")]
    encoded = await tokenizer.encode_all(texts, add_special_tokens=False)
    found: list[tuple[int, ...]] = []
    for alone, after_space in zip(encoded[::2], encoded[1::2], strict=True):
        if not alone:
            raise invalid("'bad_words' has a word without tokens.", "bad_words")
        found.append(tuple(alone))
        if len(after_space) == len(alone) and after_space[0] != alone[0]:
            found.append(tuple(after_space))
    return tuple(found)


def _allowed(body: GenerationFields, vocab_size: int, ends: Set[int]) -> tuple[int, ...] | None:
    if body.allowed_token_ids is None:
        return None
    allowed = _in_vocabulary(body.allowed_token_ids, vocab_size, "allowed_token_ids")
    if body.min_tokens and not set(allowed) - ends:
        raise invalid(
            "'allowed_token_ids' has only tokens that end the text, which 'min_tokens' forbids at first.",
            "allowed_token_ids",
        )
    return allowed


def _in_vocabulary(tokens: Sequence[int], vocab_size: int, param: str) -> tuple[int, ...]:
    for token in tokens:
        if token >= vocab_size:
            raise invalid(f"'{param}' has {shown(token)}; the vocabulary has {vocab_size} tokens.", param)
    return tuple(tokens)


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not bias:
        return None
    result: dict[int, float] = {}
    for key, value in bias.items():
        # No sign, no spaces, no digits of other scripts, all of which int() would take.
        if not (key.isascii() and key.isdigit() and len(key) <= 10) or int(key) >= vocab_size:
            raise invalid(f"'logit_bias' has {shown(key)}, which is no token id below {vocab_size}.", "logit_bias")
        result[int(key)] = value
    return result

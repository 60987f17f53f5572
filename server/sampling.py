"""Request fields become the engine's sampling parameters; what needs the vocabulary or the context is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.types import EngineInfo, SamplingSpec
from server.errors import invalid, shown
from server.protocol.common import GenerationFields
from server.text.tokenizer import TextTokenizer

_MASK = (1 << 64) - 1


def sampling_of(body: GenerationFields, info: EngineInfo, **more: Any) -> SamplingSpec:
    """Sampling parameters that all choices of a request share.

    Args:
        body: the request.
        info: the engine's vocabulary.
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
        "structured_outputs": body.grammar,
        **more,
    }
    return SamplingSpec(
        top_k=max(body.top_k or 0, 0),
        logit_bias=_logit_bias(body.logit_bias, info.vocab_size),
        stop_token_ids=_in_vocabulary(body.stop_token_ids or (), info.vocab_size, "stop_token_ids"),
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
    """A non-negative int64 that depends on both arguments in every bit (the mixing function of splitmix64)."""
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


def check_prompt(tokens: Sequence[int], vocab_size: int, param: str) -> None:
    """Token ids that a client sent.

    Raises:
        ApiError: 400, naming the field.
    """
    if not tokens:
        raise invalid(f"'{param}' has no tokens.", param)
    if max(tokens) >= vocab_size:
        raise invalid(f"'{param}' has token id {shown(max(tokens))}; the vocabulary has {vocab_size} tokens.", param)


def check_length(text: str, tokenizer: TextTokenizer, context: int, param: str) -> None:
    """Refuse a text that is too long by any count before it is tokenised, which would take time and memory.

    Raises:
        ApiError: 400, naming the field.
    """
    if len(text) > context * tokenizer.longest_token:
        raise invalid(
            f"'{param}' has {len(text)} characters, which cannot fit the context of {context} tokens.",
            param,
            "context_length_exceeded",
        )


def fit(
    prompt_tokens: int,
    max_tokens: int | None,
    default: int | None,
    context: int,
    param: str,
    name: str,
    min_tokens: int | None,
) -> int:
    """How many tokens may be written after a prompt.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: as asked for; None is ``default``, cut to what fits.
        default: None is all that fits.
        context: most tokens of prompt and text together.
        param: the prompt's field, for messages.
        name: the field of ``max_tokens``, for messages.
        min_tokens: as asked for. That it is not greater than ``max_tokens`` or ``default`` has been checked.

    Raises:
        ApiError: 400; prompt and text together don't fit the context.
    """
    room = context - prompt_tokens
    if room < 1:
        raise invalid(
            f"'{param}' has {prompt_tokens} tokens, which leaves no room in the context of {context} tokens.",
            param,
            "context_length_exceeded",
        )
    for field, asked in ((name, max_tokens), ("min_tokens", min_tokens)):
        if asked is not None and asked > room:
            raise invalid(
                f"'{field}' is {asked}, but after {prompt_tokens} prompt tokens the context of {context} tokens "
                f"has room for {room}.",
                field,
                "context_length_exceeded",
            )
    if max_tokens is None:
        return room if default is None else min(default, room)
    return max_tokens


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

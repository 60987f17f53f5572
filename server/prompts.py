"""From what a client sent to the prompt's token ids, within the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from server.errors import invalid, shown
from server.protocol.common import GenerationFields
from server.text.tokenizer import TextTokenizer


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
            f"{_maximum(context)} However, '{param}' has {len(text)} characters, which cannot fit.",
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
            f"{_maximum(context)} However, '{param}' has {prompt_tokens} tokens, which leaves no room to write.",
            param,
            "context_length_exceeded",
        )
    for field, asked in ((name, max_tokens), ("min_tokens", min_tokens)):
        if asked is not None and asked > room:
            raise invalid(
                f"{_maximum(context)} However, you requested {prompt_tokens + asked} tokens: {prompt_tokens} in "
                f"'{param}' and {asked} by '{field}', which may be at most {room} here.",
                field,
                "context_length_exceeded",
            )
    if max_tokens is None:
        return room if default is None else min(default, room)
    return max_tokens


async def prompt_tokens(
    text: str,
    tokenizer: TextTokenizer,
    body: GenerationFields,
    context: int,
    param: str,
    *,
    special: bool,
    encode: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """Token ids of a prompt, cut if the request allows that.

    Args:
        context: most tokens of prompt and text together.
        param: the prompt's field, for messages.
        special: whether the tokenizer's special tokens are added where the request does not say.
        encode: makes tokens of the text, without those; slow. Default: the tokenizer does.

    Raises:
        ApiError: 400, the text cannot fit the context.
    """
    special = special if body.add_special_tokens is None else body.add_special_tokens
    keep, side = kept_tokens(body, context), body.truncation_side
    if keep is None:
        check_length(text, tokenizer, context, param)
        if encode is None:
            return await tokenizer.encode(text, add_special_tokens=special)
    else:
        # More cannot be kept, and tokenising it would take time and memory.
        longest = context * tokenizer.longest_token
        text = text[:longest] if side == "right" else text[-longest:]
    if encode is None:
        plain = await tokenizer.encode(text, add_special_tokens=False)
    else:
        plain = await tokenizer.run(partial(encode, text))
    before, after = await _special_tokens(tokenizer) if special else ([], [])
    if keep is None:
        return before + plain + after
    # Special tokens stay where they are, before and after the text, as in the tokenizers library's own truncation.
    room = keep - len(before) - len(after)
    return before + truncated(plain, room, side) + after if room > 0 else truncated(before + plain + after, keep, side)


async def _special_tokens(tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer writes before and after a text."""
    whole, plain = [await tokenizer.encode("a", add_special_tokens=special) for special in (True, False)]
    start = next(start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def kept_tokens(body: GenerationFields, context: int) -> int | None:
    """How many tokens of a prompt are kept; None where it is not cut.

    Raises:
        ApiError: 400, more than the context has.
    """
    keep = body.truncate_prompt_tokens
    if keep is None:
        return None
    if keep > context:
        raise invalid(f"{_maximum(context)} 'truncate_prompt_tokens' is {keep}.", "truncate_prompt_tokens")
    return context - 1 if keep < 0 else keep


def truncated(tokens: list[int], keep: int, side: str | None) -> list[int]:
    """The last ``keep`` tokens, or the first where ``side`` is "right"."""
    if len(tokens) <= keep:
        return tokens
    return tokens[:keep] if side == "right" else tokens[len(tokens) - keep :]


def _maximum(context: int) -> str:
    # Client libraries look for these words to tell this error from others.
    return f"This model's maximum context length is {context} tokens."

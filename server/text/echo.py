"""A prompt as echo returns it, and where its tokens stand in it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from server.text.tokenizer import TextTokenizer

_DROPPED = 64
"""Characters of white space that a tokenizer may leave out in one place, beside a special token for example."""


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt as echo returns it.

    Attributes:
        text: as it was sent, or that of the tokens that were.
        offsets: for each token where it begins in the text, in characters.
        unfinished: "", or the replacement of a character that the tokens begin and do not finish. It is no part of
            ``text``, since what follows may finish it; see :mod:`server.text.detokenize`.
    """

    text: str
    tokens: list[int]
    offsets: list[int]
    unfinished: str = ""


def echoed(tokenizer: TextTokenizer, given: str | list[int], tokens: list[int]) -> EchoedPrompt:
    """Echo one prompt. Slow for long prompts: run in a thread.

    Args:
        given: as it was sent.
        tokens: the same as token ids.
    """
    detokenizer = tokenizer.detokenizer()
    texts: list[str] = []
    leads: list[int] = []
    for token in tokens:
        text = detokenizer.push(token)
        texts.append(text)
        leads.append(detokenizer.lead(token, text, final=False) if text.startswith("\ufffd") else 0)
    if isinstance(given, str):
        return EchoedPrompt(given, tokens, _offsets(tokenizer, given, tokens, texts))
    *begins, _ = accumulate(map(len, texts), initial=0)
    offsets = [begin + lead for begin, lead in zip(begins, leads, strict=True)]
    return EchoedPrompt("".join(texts), tokens, offsets, detokenizer.flush())


def _offsets(tokenizer: TextTokenizer, given: str, tokens: list[int], texts: list[str]) -> list[int]:
    """Where tokens stand in the text that they were made of.

    The tokenizer's own offsets are not it: byte-level ones leave the space before a word out. So the tokens' texts are
    counted, and those of special tokens too, which detokenising skips, where the text has them: others come from the
    tokenizer. A text that the tokenizer normalises to another length has offsets that are only near.
    """
    offsets = []
    position = 0
    for token, text in zip(tokens, texts, strict=True):
        special = tokenizer.is_special(token)
        shown = tokenizer.token_text(token) if special else text
        found = _find(shown, given, position)
        if found is not None:
            offsets.append(found)
            position = found + len(shown)
        else:
            offsets.append(position)
            position = min(position + len(text), len(given))
    return offsets


def _find(shown: str, given: str, position: int) -> int | None:
    if given.startswith(shown, position):
        return position
    following = given[position : position + _DROPPED]
    position += len(following) - len(following.lstrip())
    return position if given.startswith(shown, position) else None

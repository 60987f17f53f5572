"""Token ids to text, one token at a time, after a prompt.

The text of an answer is what decoding prompt and answer together has beyond decoding the prompt: the space before the
answer's first word belongs to the answer, and a character that the prompt began is finished by it. So a detokenizer
begins with the prompt's last tokens.

A character whose bytes are spread over several tokens appears when its last byte does. Bytes that never become a
character are shown as U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from engine.spelling.decoding import Decoding

CONTEXT = 32
"""Tokens of a prompt that a detokenizer is begun with."""

_LONGEST_CHARACTER = 8
"""Tokens that are waited for at most to become a character; one has four bytes, and a token one at least."""


class Detokenizer(Protocol):
    """Incremental detokenisation of one sequence."""

    def push(self, token: Any) -> str:
        """The text that this token adds; "" while a character is incomplete, and for special tokens.

        Args:
            token: its id; for texts that are not written in tokens, bytes.
        """
        ...

    def flush(self) -> str:
        """What is left at the end: "" or the replacement of an incomplete character."""
        ...

    def lead(self, token: Any, text: str, *, final: bool) -> int:
        """How much of a token's text stands for characters that tokens before it began and it does not finish.

        Args:
            token: the one that was pushed last.
            text: what that gave, with what is left if it is the ``final`` one.
        """
        ...


class TableDetokenizer:
    """For decoders that give each token the same bytes wherever it stands; see :mod:`engine.spelling.decoding`.

    This is the common case and the hot path: a table and an incremental UTF-8 decoder.

    Args:
        token_bytes: bytes of a token id, b"" for tokens that are not shown.
        first_bytes: bytes of a token id at the beginning of a text.
        before: the tokens before.
        begun: whether there are still others before these.
    """

    def __init__(
        self,
        decoding: Decoding,
        token_bytes: Callable[[int], bytes],
        first_bytes: Callable[[int], bytes],
        before: Iterable[int] = (),
        *,
        begun: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._first_bytes = first_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=decoding.errors)
        self._stripped, self._to_strip = decoding.strip
        self._begun = begun
        for token in before:
            self.push(token)

    def push(self, token: int) -> str:
        """See :class:`Detokenizer`."""
        data = self._token_bytes(token)
        if self._begun:
            return self._decoder.decode(data)
        return self._begin(token) if data else ""

    def flush(self) -> str:
        """See :class:`Detokenizer`."""
        return self._decoder.decode(b"", final=True)

    def lead(self, token: int, text: str, *, final: bool) -> int:
        """See :class:`Detokenizer`."""
        own = codecs.getincrementaldecoder("utf-8")(errors=self._decoder.errors).decode(self._token_bytes(token), final)
        return max(0, len(text) - len(own))

    def _begin(self, token: int) -> str:
        text = self._decoder.decode(self._first_bytes(token))
        while self._to_strip and text.startswith(self._stripped):
            text = text[len(self._stripped) :]
            self._to_strip -= 1
        self._begun = bool(text) or not self._to_strip
        return text


class WindowDetokenizer:
    """For every other decoder: a token's text is what the last tokens with it have beyond the last tokens without it.

    What such a decoder would change in hindsight, in text that was given out already, stays as it was given out.

    Args:
        decode: text of a run of tokens.
        before: the tokens before.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Iterable[int] = ()) -> None:
        self._decode = decode
        self._known = list(before)
        # A character that is not complete yet is held, with the prompt's tokens that began it.
        complete = len(self._known)
        while complete and len(self._known) - complete < _LONGEST_CHARACTER and self._unfinished(complete):
            complete -= 1
        if self._unfinished(complete):
            complete = len(self._known)
        self._held = self._known[complete:]
        del self._known[complete:]

    def push(self, token: int) -> str:
        """See :class:`Detokenizer`."""
        self._held.append(token)
        return self._take(incomplete=len(self._held) < _LONGEST_CHARACTER)

    def flush(self) -> str:
        """See :class:`Detokenizer`."""
        return self._take(incomplete=False) if self._held else ""

    def lead(self, token: int, text: str, *, final: bool) -> int:
        """See :class:`Detokenizer`."""
        own = self._decode([token])
        before = text.removesuffix(own)
        return len(before) if text.endswith(own) and not before.strip("\ufffd") else 0

    def _unfinished(self, count: int) -> bool:
        return self._decode(self._known[:count]).endswith("\ufffd")

    def _take(self, *, incomplete: bool) -> str:
        together = self._known + self._held
        text = self._decode(together)
        if incomplete and text.endswith("\ufffd"):
            return ""
        text = text[len(self._decode(self._known)) :]
        self._known = together[-CONTEXT:]
        self._held.clear()
        return text


class ByteDetokenizer:
    """For texts that are not written in tokens but in pieces of bytes. A prompt's characters are complete."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: bytes) -> str:
        """See :class:`Detokenizer`."""
        return self._decoder.decode(token)

    def flush(self) -> str:
        """See :class:`Detokenizer`."""
        return self._decoder.decode(b"", final=True)

    def lead(self, token: bytes, text: str, *, final: bool) -> int:
        """See :class:`Detokenizer`."""
        own = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(token, final)
        return max(0, len(text) - len(own))

"""Token ids to text, one token at a time.

A character whose bytes are spread over several tokens appears when its last byte does. Bytes that never become a
character are shown as U+FFFD, exactly where decoding the whole text at once would show them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer(Protocol):
    """Incremental detokenisation of one sequence."""

    def push(self, token: int) -> str:
        """The text that this token adds; "" while a character is incomplete, and for special tokens."""
        ...

    def flush(self) -> str:
        """What is left at the end: "" or the replacement of an incomplete character."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies, where every token is a fixed run of bytes.

    This is the common case (GPT-2, Llama 3, Qwen and their kin) and the hot path: a table and an incremental UTF-8
    decoder cost a fraction of ``DecodeStream``, which decodes a window of tokens anew at each step, and a window that
    grows for as long as the bytes are no text.

    Args:
        token_bytes: bytes of a token id, b"" for tokens that are not shown.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """See :class:`Detokenizer`."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """See :class:`Detokenizer`."""
        return self._decoder.decode(b"", final=True)


class StreamDetokenizer:
    """For every other decoder (SentencePiece, WordPiece ...), by the tokenizers library's own ``DecodeStream``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """See :class:`Detokenizer`."""
        self._held.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer, token)
        except Exception:
            # The library gives up ("invalid prefix") on sequences that its decoder rewrites in hindsight. What it
            # held back is then decoded by itself, and the stream begins anew.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self.flush()
        if text is None:
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """See :class:`Detokenizer`."""
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=True) if self._held else ""
        self._held.clear()
        return text

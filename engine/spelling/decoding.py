r"""What a single token adds to a text, worked out from the decoder of a ``tokenizer.json``.

Nearly all decoders in use give each token the same bytes wherever it stands, but for the beginning of the text:
SentencePiece's own dummy prefix is stripped there, and WordPiece has no space to put before the first word. Such a
decoder is a table of bytes and a rule for the beginning, so that detokenising needs neither a window of tokens that is
decoded anew at every step nor more of a prompt than its last tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

BYTEWISE = "collm.bytewise"
"""Name of the error handler that shows each byte of an incomplete character as U+FFFD, as byte fallback does."""

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_CONTRACTIONS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What the clean-up of a WordPiece decoder replaces within a token and the space before it."""


def _bytewise(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(BYTEWISE, _bytewise)


def _unchanged(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class Decoding:
    """A decoder that treats tokens one by one.

    Attributes:
        spell: a token's string as text, anywhere but at the beginning.
        begin: the same for the first token of a text.
        byte_level: the strings are in the alphabet of byte-level vocabularies.
        byte_fallback: a string such as ``<0xE6>`` is that byte.
        strip: a character, and how many of it are dropped from the beginning of the text.
    """

    spell: Callable[[str], str] = _unchanged
    begin: Callable[[str], str] = _unchanged
    byte_level: bool = False
    byte_fallback: bool = False
    strip: tuple[str, int] = (" ", 0)

    @property
    def errors(self) -> str:
        """The error handler that shows bytes which are no text as the tokenizers library shows them."""
        return BYTEWISE if self.byte_fallback else "replace"

    def bytes_of(self, content: str, *, first: bool = False) -> bytes:
        """The bytes of a token whose string is ``content``."""
        if self.byte_level:
            return _byte_level(content)
        if self.byte_fallback and (fallback := _FALLBACK.fullmatch(content)):
            return bytes([int(fallback[1], 16)])
        return (self.begin if first else self.spell)(content).encode("utf-8", "replace")

    def then(self, spell: Callable[[str], str], begin: Callable[[str], str] | None = None) -> Decoding:
        """This decoding followed by another change of each token's text."""
        before, before_first, later = self.spell, self.begin, begin or spell
        return replace(self, spell=lambda text: spell(before(text)), begin=lambda text: later(before_first(text)))


def decoding_of(tokenizer: Tokenizer) -> Decoding | None:
    """The decoding of a tokenizer; None if its decoder does not treat tokens one by one, or is not known here."""
    if tokenizer.decoder is None:
        return None
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    decoding: Decoding | None = Decoding()
    fused = False
    for step in steps:
        if decoding is None:
            return None
        if step["type"] == "Fuse":
            fused = True
        elif step["type"] == "Strip":
            alone = fused and not step["stop"] and not decoding.strip[1]
            decoding = replace(decoding, strip=(step["content"], step["start"])) if alone else None
        else:
            decoding = None if fused else _with_step(decoding, step)
    return decoding


def _with_step(decoding: Decoding, step: dict[str, Any]) -> Decoding | None:
    match step:
        case {"type": "ByteLevel"}:
            return replace(decoding, byte_level=True) if decoding == Decoding() else None
        case {"type": "ByteFallback"} if not decoding.byte_level:
            return replace(decoding, byte_fallback=True)
        case {"type": "Replace", "pattern": {"String": old}, "content": new} if not decoding.byte_level:
            return decoding.then(lambda text: text.replace(old, new))
        case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme} if not decoding.byte_level:
            return decoding.then(
                lambda text: text.replace(old, " "),
                lambda text: text.replace(old, " " if scheme == "never" else ""),
            )
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup} if decoding == Decoding():
            tidy = _tidy if cleanup else _unchanged
            return decoding.then(
                lambda text: tidy(text.removeprefix(prefix) if text.startswith(prefix) else f" {text}"), tidy
            )
    return None


def _tidy(text: str) -> str:
    for old, new in _CONTRACTIONS:
        text = text.replace(old, new)
    return text


def _byte_level(content: str) -> bytes:
    try:
        return content.translate(_alphabet()).encode("latin-1")
    except UnicodeEncodeError:
        # The library's decoder takes a string outside of the alphabet as it stands.
        return content.encode("utf-8", "replace")


@lru_cache(maxsize=1)
def _alphabet() -> dict[int, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 characters stand for their own byte, the other bytes
    for the characters from U+0100 on, in order. Characters below U+0100 that are not in it are mapped to one that is no
    byte.
    """
    table: dict[int, int] = {}
    shifted = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD):
            table[byte] = byte
        else:
            table[0x100 + shifted] = byte
            table[byte] = 0xFFFD
            shifted += 1
    return table


def token_bytes(decoding: Decoding, content: str, *, added: bool, first: bool = False) -> bytes:
    """The bytes that one token adds to a text.

    Args:
        decoding: the tokenizer's.
        content: the token's entry in the vocabulary.
        added: whether it is an added token.
        first: whether it begins the text.
    """
    data = decoding.bytes_of(content, first=first)
    if added and not _is_text(data):
        # The library would read "é" in an added token as a byte of the byte-level alphabet, and show U+FFFD.
        return content.encode("utf-8", "replace")
    return data


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True

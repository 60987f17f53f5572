"""A tokenizer as a set of byte strings, sorted, so that the tokens that begin with a prefix are one span."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.spelling.decoding import decoding_of, token_bytes

_TEXT_BYTES = [*range(0x09, 0x0E), *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3, 0xF4]
"""Bytes that occur in texts: those of UTF-8, but for control characters and for what begins only characters that are
not assigned. Trained vocabularies lack some of those, SmolLM2's for instance; who has to spell one says so then.
"""

_CACHED_PREFIXES = 4096


class VocabularyError(Exception):
    """A tokenizer whose tokens are no byte strings. The message is one line."""


class Branches(NamedTuple):
    """How the tokens that begin with a prefix go on; indices into ``Vocabulary.order``.

    Attributes:
        begin: first token of the span.
        exact: end of the tokens that are the prefix itself; they come first.
        bounds: [257]; tokens whose next byte is b are in bounds[b]:bounds[b + 1].
    """

    begin: int
    exact: int
    bounds: NDArray[np.int32]

    @property
    def end(self) -> int:
        """End of the span."""
        return int(self.bounds[-1])


class Children(NamedTuple):
    """What can follow a prefix of tokens, without what cannot.

    Attributes:
        begin: first token of the prefix's span.
        end: end of the span.
        symbols: the next bytes, ascending; then EXACT (256) if there are tokens that are the prefix itself.
        starts: [len(symbols)], ascending: where the tokens of each begin, from ``begin`` on; those of EXACT come first,
            so that its is the first.
    """

    begin: int
    end: int
    symbols: tuple[int, ...]
    starts: NDArray[np.intp]


class Vocabulary:
    """The text tokens of a tokenizer.

    Special tokens and those that end a text are no text: :meth:`bytes_of` gives None for them, and nothing here ever
    proposes one. Added tokens that are not special are text.

    Args:
        tokenizer: as loaded from ``tokenizer.json``.
        stops: token ids that end a text for its model.
        size: number of the model's outputs, if ids beyond them are to be left out; None keeps all.

    Attributes:
        order: [N] int32, ids of the text tokens sorted by their bytes, equal ones by id.
        distinct: [S] int32, places in ``order`` of the first token of each byte string.
        stops: the ids that end a text.
        added: the added tokens that are text, by their bytes. The tokenizer looks for them before all else.
        longest: bytes of the longest token.

    Raises:
        VocabularyError: the decoder does not give each token bytes of its own.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[int] = (), *, size: int | None = None) -> None:
        decoding = decoding_of(tokenizer)
        if decoding is None:
            raise VocabularyError("the tokenizer's decoder does not give each token bytes of its own")
        self.stops = tuple(sorted(set(stops)))
        added = tokenizer.get_added_tokens_decoder()
        names: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        entries = {token: name for name, token in names.items() if size is None or token < size}
        texts: list[bytes | None] = [None] * (max(entries, default=-1) + 1)
        for token, name in entries.items():
            entry = added.get(token)
            if token not in self.stops and (entry is None or not entry.special):
                texts[token] = token_bytes(decoding, name, added=entry is not None) or None
        self._entries = entries
        self.added = {text: token for token in added if token < len(texts) and (text := texts[token]) is not None}
        self._texts = texts
        order = sorted((text, token) for token, text in enumerate(texts) if text is not None)
        self._sorted = [text for text, _ in order]
        self.order: NDArray[np.int32] = np.fromiter((token for _, token in order), np.int32, len(order))
        self.longest = max(map(len, self._sorted), default=0)
        first = [place for place, text in enumerate(self._sorted) if not place or text != self._sorted[place - 1]]
        self.distinct: NDArray[np.int32] = np.array(first, np.int32)
        lengths = np.fromiter(map(len, self._sorted), np.int64, len(order))
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if order else np.zeros(0, np.int64)
        self._flat = np.frombuffer(b"".join(self._sorted), np.uint8)
        self.branches = lru_cache(_CACHED_PREFIXES)(self._branches)
        """How the tokens that begin with some bytes go on, see :class:`Branches`."""
        self.children = lru_cache(_CACHED_PREFIXES)(self._children)
        """The same without what does not occur, see :class:`Children`."""
        self.places = lru_cache(_CACHED_PREFIXES)(self._places)
        """Where in ``order`` the tokens are that have exactly some bytes: [begin, end)."""

    def __len__(self) -> int:
        """Number of text tokens."""
        return len(self._sorted)

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a token; None if it is no text: special, unknown, or without any."""
        return self._texts[token] if 0 <= token < len(self._texts) else None

    def text_of(self, tokens: Iterable[int]) -> bytes:
        """The bytes of several tokens; those that are no text have none."""
        return b"".join(self.bytes_of(token) or b"" for token in tokens)

    def span(self, prefix: bytes) -> tuple[int, int]:
        """Where in ``order`` the tokens are that begin with ``prefix``: [begin, end)."""
        begin = bisect_left(self._sorted, prefix)
        stem = prefix.rstrip(b"\xff")
        if not stem:
            return begin, len(self._sorted)
        return begin, bisect_left(self._sorted, stem[:-1] + bytes([stem[-1] + 1]), begin)

    def _places(self, text: bytes) -> tuple[int, int]:
        begin = bisect_left(self._sorted, text)
        end = begin
        while end < len(self._sorted) and self._sorted[end] == text:
            end += 1
        return begin, end

    def exact(self, text: bytes) -> tuple[int, ...]:
        """The tokens with exactly these bytes; there may be several."""
        begin, end = self.places(text)
        return tuple(map(int, self.order[begin:end]))

    def longest_match(self, text: bytes, at: int = 0) -> int | None:
        """The longest token that ``text`` continues with at an offset; None if there is none."""
        found = None
        for end in range(at + 1, min(len(text), at + self.longest) + 1):
            prefix = text[at:end]
            begin = bisect_left(self._sorted, prefix)
            if begin == len(self._sorted) or not self._sorted[begin].startswith(prefix):
                break
            if self._sorted[begin] == prefix:
                found = int(self.order[begin])
        return found

    def lacking(self) -> tuple[int, ...]:
        """Bytes of texts for which there is no token, in order. With none lacking every text can be spelled that holds
        neither control characters nor characters that Unicode has not assigned.
        """
        return tuple(byte for byte in _TEXT_BYTES if not self.exact(bytes([byte])))

    @cached_property
    def joined(self) -> bytes:
        """All text tokens but the added ones, in order, each after a zero byte: for searches over the vocabulary."""
        return b"".join(b"\0" + text for text in self._sorted if text not in self.added)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids and entries, special ones included: equal for tokenizers with the same vocabulary."""
        digest = hashlib.sha256()
        for token in sorted(self._entries):
            digest.update(f"{token} {self._entries[token]}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _branches(self, prefix: bytes) -> Branches:
        begin, end = self.span(prefix)
        exact = bisect_right(self._sorted, prefix, begin, end) if prefix else begin
        following = self._flat[self._starts[exact:end] + len(prefix)]
        bounds = np.searchsorted(following, np.arange(257)) + exact
        return Branches(begin, exact, bounds.astype(np.int32))

    def _children(self, prefix: bytes) -> Children:
        begin, exact, bounds = self._branches(prefix)
        symbols = np.flatnonzero(bounds[1:] > bounds[:-1])
        starts = bounds[symbols].astype(np.intp) - begin
        if exact > begin:
            starts = np.concatenate([[0], starts])
        return Children(begin, int(bounds[-1]), (*map(int, symbols), *([256] if exact > begin else [])), starts)


def obstacle(vocabulary: Vocabulary) -> str | None:
    """Why a model with this vocabulary cannot write a text together with other vocabularies; None if it can."""
    lacking = vocabulary.lacking()
    if lacking:
        named = ", ".join(f"0x{byte:02X}" for byte in lacking[:3])
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        return f"the vocabulary has no token for the byte {named}{more}: it cannot spell every text"
    return None

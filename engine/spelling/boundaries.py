r"""Offsets at which a tokenizer can be restarted: what precedes is spelled the same whatever follows, and what follows
is spelled as it would be there.

Pre-tokenizers look ahead (``\s+(?!\S)`` gives the last space of a run to the next word), group digits, take a line
break to the punctuation before it or a contraction to its word; SentencePiece has no pre-tokenizer at all. So an
offset counts only where all families in use have a boundary, and only as far as no token of the vocabulary at hand
reaches across one of its kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.spelling.vocabulary import Vocabulary

# Spaces beyond ASCII, in UTF-8: U+0085, U+00A0, U+1680, U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F, U+3000.
_OTHER_SPACES = (
    rb"\xc2[\x85\xa0]", rb"\xe1\x9a\x80", rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]", rb"\xe2\x81\x9f", rb"\xe3\x80\x80",
)  # fmt: skip


def _behind_no_space(between: bytes = b"") -> bytes:
    """Where ``between`` stands behind anything but white space."""
    spaces = b"".join(rb"(?<!" + space + between + rb")" for space in _OTHER_SPACES)
    return rb"(?<=[^\x00-\x20\x7f]" + between + rb")" + spaces


_MARK = rb"(?=[,.;:!?()\[\]{}\"<>=+*/\\|&%$#@^~])"
_NUMBER = _behind_no_space(b" ") + rb"(?=[0-9])"
_KINDS = (
    # A space after anything else. The space may be followed by others: they are one run.
    _behind_no_space() + rb"(?= )",
    # A number after a single space: some families take the space to the number.
    _NUMBER,
    # A line break after a word; after punctuation it may be the punctuation's.
    rb"(?<=[0-9A-Za-z])(?=[\r\n])",
    # A mark after a letter, or after a number; apostrophes may begin a contraction.
    rb"(?<=[A-Za-z])" + _MARK,
    rb"(?<=[0-9])" + _MARK,
    # A number after a mark that may stand between two.
    rb"(?<=[,.:=+*/^])(?=[0-9])",
    # The same in Chinese and Japanese: after an ideograph U+3001, U+3002, U+FF01, U+FF0C, U+FF1A, U+FF1B or U+FF1F.
    rb"(?<=[\xe4-\xe9][\x80-\xbf]{2})(?=\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9a\x9b\x9f])",
)
_ACROSS = {_NUMBER: rb"(?<= )(?=[0-9])"}
"""What in a token rules a kind out, if not the kind itself: what that looks back at may be in another token."""
_CONTEXT = 4
"""Bytes to both sides that a kind of boundary looks at, at most."""


class Boundaries:
    """The safe boundaries of one vocabulary.

    A kind of boundary is used only if no text token has one inside. Added tokens may: where one of them stands across
    an offset, or may do so once more is written, the offset does not count.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        kinds = [kind for kind in _KINDS if not re.search(_ACROSS.get(kind, kind), vocabulary.joined, re.DOTALL)]
        self._pattern = re.compile(b"|".join(kinds), re.DOTALL) if kinds else None
        self._across: list[tuple[bytes, bytes]] = []
        for text in vocabulary.added:
            inside = self._pattern.finditer(text) if self._pattern else ()
            self._across += [(text[: match.start()], text[match.start() :]) for match in inside]

    def at(self, text: bytes | bytearray, offset: int) -> bool:
        """Whether an offset in ``text`` is a safe boundary; those at its ends are none."""
        if self._pattern is None or not 0 < offset < len(text) or self._pattern.match(text, offset) is None:
            return False
        return not (self._across and self._crossed(text, offset))

    def within(self, text: bytes | bytearray, begin: int, end: int) -> Iterator[int]:
        """Safe boundaries b with begin <= b <= end, in order; those at the ends of ``text`` are not among them."""
        if self._pattern is None:
            return
        first = max(begin - _CONTEXT, 0)
        for match in self._pattern.finditer(text[first : end + _CONTEXT]):
            offset = match.start() + first
            if offset > end:
                break
            if offset >= begin and not (self._across and self._crossed(text, offset)):
                yield offset

    def _crossed(self, text: bytes | bytearray, offset: int) -> bool:
        return any(
            after.startswith(text[offset : offset + len(after)]) and text.endswith(before, 0, offset)
            for before, after in self._across
        )

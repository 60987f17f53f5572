"""Words that a model writes into a text whose tokens are another model's.

Within a word of one vocabulary the other one has no boundary, and a model that is asked there has to go on from a
context that it has not seen in training. So who is asked writes to the end of a word, and is asked only where a word
begins.
"""

from __future__ import annotations

from engine.spelling.boundaries import Boundaries
from engine.spelling.speller import Speller

MOST_BYTES = 64
"""Of a word; the letters of a script without spaces, or of a number, may go on for ever."""

_SPACE = b" \t\r\n\v\f"
_CONTEXT = 8
"""Bytes before a word that may matter to where it begins."""


def begins_word(boundaries: Boundaries, text: bytes, upcoming: bytes) -> bool:
    """Whether ``upcoming`` begins a word after ``text``, so that what is written before will be spelled no other way.

    A run of white space is a word, but for a single space: it belongs to what follows.
    """
    if not text or not upcoming:
        return True
    tail = text[-_CONTEXT:]
    if any(True for _ in boundaries.within(tail + upcoming, len(tail), len(tail))):
        return True
    return tail[-1:] in b"\n\r\t" and upcoming[:1] not in _SPACE


def inside_character(text: bytes | bytearray) -> bool:
    """Whether a text ends with the beginning of a character in UTF-8."""
    for back, byte in enumerate(reversed(text[-3:]), 1):
        if byte >= 0xC0:
            return 0xC2 <= byte < 0xF5 and back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False


class Word:
    """Collects the tokens of one word, as its writer samples them.

    Args:
        speller: of the writer's vocabulary.
        text: what is written before, or its end.
        most_bytes: the word is closed when it would be longer, but not inside a character.

    Attributes:
        tokens: of the word.
        text: its bytes.
        closed: whether it is complete; the token that showed it is not part of it.
        ended: whether the writer ended the text; only an empty word can be an end that is written.
    """

    __slots__ = ("_before", "_most_bytes", "_speller", "closed", "ended", "text", "tokens")

    def __init__(self, speller: Speller, text: bytes, most_bytes: int = MOST_BYTES) -> None:
        self._speller = speller
        self._before = text[-_CONTEXT:]
        self._most_bytes = most_bytes
        self.tokens: list[int] = []
        self.text = b""
        self.closed = False
        self.ended = False

    def add(self, token: int) -> bool:
        """The writer's next token.

        Returns:
            Whether it belongs to the word. If not, the word is closed, and the token is what the writer would go on
            with: it is dropped.
        """
        assert not self.closed, "the word is complete"
        vocabulary = self._speller.vocabulary
        part = vocabulary.bytes_of(token)
        if part is None:
            self.ended = token in vocabulary.stops
            self.closed = True
            return False
        if (
            self.text
            and (
                (len(self.text) + len(part) > self._most_bytes and not inside_character(self.text))
                or begins_word(self._speller.boundaries, self._before + self.text, part)
                # Behind a mark a line break may be the mark's, in some vocabularies, but the sentence is over.
                or (part.startswith((b"\r", b"\n")) and self.text[-1:] not in _SPACE)
            )
        ):
            self.closed = True
            return False
        self.tokens.append(token)
        self.text += part
        return True

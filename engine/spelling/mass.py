"""The probability that one model, at one position, gives to a prefix, whatever token continues it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.spelling.vocabulary import Children, Vocabulary

EXACT = 256
"""Symbol: the token ends here."""

END = 257
"""Symbol: the text ends here."""

SYMBOLS = 258

_SHORT = 1024
"""Spans up to this many tokens are summed directly."""

_FAINT = 1e-6
"""Below this a difference of cumulative sums has lost digits, and the span is summed directly."""


class Mass:
    """A next-token distribution as a distribution over byte strings.

    Special tokens are left out; the ids that end a text are one symbol, END. The rest is renormalised.

    Args:
        vocabulary: the model's.
        probabilities: [V] for each token id, not negative; entries beyond the vocabulary are ignored.

    Attributes:
        end: probability that the text ends.

    Raises:
        ValueError: a probability is not finite, or no token of the vocabulary has any.
    """

    __slots__ = ("_cumulative", "_first", "_text", "_vocabulary", "end")

    def __init__(self, vocabulary: Vocabulary, probabilities: NDArray[np.floating]) -> None:
        text = probabilities[vocabulary.order].astype(np.float64)
        stops = [stop for stop in vocabulary.stops if stop < len(probabilities)]
        end = float(probabilities[stops].sum(dtype=np.float64))
        total = float(text.sum()) + end
        if not (np.isfinite(total) and total > 0):
            raise ValueError("a distribution is not finite, or empty")
        text /= total
        self._vocabulary = vocabulary
        self._text = text
        self._cumulative = np.concatenate([[0.0], np.cumsum(text)])
        self.end = end / total
        self._first: NDArray[np.float64] | None = None

    @classmethod
    def summed(
        cls,
        vocabulary: Vocabulary,
        text: NDArray[np.float64],
        sums: NDArray[np.float64],
        end: float,
        first: NDArray[np.float64] | None = None,
    ) -> Mass:
        """From what was gathered and added up elsewhere.

        Args:
            text: [N] probability of each of ``vocabulary.order``.
            sums: [N + 1] their sums up to each, from 0 on.
            end: probability that the text ends.
            first: [SYMBOLS] what :meth:`first` is to say, if that was worked out there too.
        """
        mass = cls.__new__(cls)
        mass._vocabulary, mass._text, mass._cumulative, mass.end = vocabulary, text, sums, end
        mass._first = first
        return mass

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return int(self._text.nbytes + self._cumulative.nbytes + (0 if self._first is None else self._first.nbytes))

    def copy(self) -> Mass:
        """One that keeps no other rows in memory that it was computed with."""
        first = None if self._first is None else self._first.copy()
        return Mass.summed(self._vocabulary, self._text.copy(), self._cumulative.copy(), self.end, first)

    def first(self) -> NDArray[np.float64]:
        """[SYMBOLS]: probability of the next token's first byte, and of the end of the text; not to be written to.

        Differences of sums: below 1e-6 :meth:`of` knows more digits, and whether there is anything at all.
        """
        if self._first is None:
            # Sums of another device may fall where nothing is added.
            self._first = np.maximum(self.next(b""), 0.0)
        return self._first

    def of(self, prefix: bytes) -> float:
        """Probability that the next token begins with ``prefix``; for b"" that the text goes on."""
        return self._sum(*self._vocabulary.span(prefix))

    def at(self, text: bytes) -> float:
        """Probability that the next token is exactly ``text``."""
        return self._sum(*self._vocabulary.places(text))

    def best(self) -> bytes:
        """The most probable byte string; b"" if the end is more probable. Of equal ones the first."""
        chances = self._by_string()
        place = int(chances.argmax())
        return b"" if chances[place] < self.end else self._string(place)

    def top(self, count: int) -> list[bytes]:
        """The ``count`` most probable byte strings in that order, of equal ones the first by bytes; b"" is the end."""
        chances = self._by_string()
        count = min(count, len(chances))
        least = np.partition(chances, len(chances) - count)[len(chances) - count]
        found = {self._string(place): float(chances[place]) for place in np.flatnonzero(chances >= least)}
        found[b""] = self.end
        return sorted(found, key=lambda text: (-found[text], text))[:count]

    def likeliest(self, text: bytes) -> int | None:
        """The most probable of the tokens that are exactly ``text``; None if there is none."""
        begin, end = self._vocabulary.places(text)
        return int(self._vocabulary.order[begin + int(self._text[begin:end].argmax())]) if begin < end else None

    def next(self, prefix: bytes) -> NDArray[np.float64]:
        """[SYMBOLS]: probability that the next token begins with ``prefix`` and goes on by a byte, or is ``prefix``
        itself (EXACT); for b"" also that the text ends (END), for others that is 0.
        """
        branches = self._vocabulary.branches(prefix)
        begin, end = branches.begin, branches.end
        if branches.exact == end:
            # Nothing goes on.
            masses = np.zeros(SYMBOLS)
            masses[EXACT] = (
                self._text[begin:end].sum() if end > begin + 1 else self._text[begin] if end > begin else 0.0
            )
            masses[END] = 0.0 if prefix else self.end
            return masses
        sums, offset = self._cumulative, 0
        if end - begin <= _SHORT or sums[end] - sums[begin] < _FAINT:
            sums, offset = np.concatenate([[0.0], np.cumsum(self._text[begin:end])]), begin
        masses = np.empty(SYMBOLS)
        at = sums[branches.bounds - offset]
        np.subtract(at[1:], at[:-1], out=masses[:256])
        masses[EXACT] = at[0] - sums[begin - offset]
        masses[END] = 0.0 if prefix else self.end
        return masses

    def begins(self, byte: int) -> bool:
        """Whether any token that begins with a byte is possible."""
        if self.first()[byte] >= _FAINT:
            return True
        begin, end = self._vocabulary.span(bytes([byte]))
        return bool(self._text[begin:end].any())

    def following(self, children: Children) -> list[float]:
        """What :meth:`next` says of a prefix that is not empty, without the symbols that no token has.

        Args:
            children: the prefix's, in the model's vocabulary.

        Returns:
            The probability of each of ``children.symbols``.
        """
        begin, end, symbols, starts = children
        if end - begin == 1:
            return [float(self._text[begin])]
        if not symbols:
            return []
        sums = self._cumulative
        if end - begin <= _SHORT or sums[end] - sums[begin] < _FAINT:
            masses: list[float] = np.add.reduceat(self._text[begin:end], starts).tolist()
        else:
            masses = np.maximum(np.diff(sums[starts + begin], append=sums[end]), 0.0).tolist()
        if symbols[-1] == EXACT:
            # Its tokens are the first of the span.
            masses.append(masses.pop(0))
        return masses

    def _sum(self, begin: int, end: int) -> float:
        mass = float(self._cumulative[end] - self._cumulative[begin])
        if mass < _FAINT:
            return float(self._text[begin:end].sum())
        return mass

    def _by_string(self) -> NDArray[np.float64]:
        """[S]: the tokens with the same bytes together."""
        return np.add.reduceat(self._text, self._vocabulary.distinct)

    def _string(self, place: int) -> bytes:
        return self._vocabulary.bytes_of(int(self._vocabulary.order[self._vocabulary.distinct[place]])) or b""

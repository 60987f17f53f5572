"""Stop strings, found while the text is still being written.

The rule does not depend on how the text is cut into tokens: of all occurrences of all stop strings in the whole text,
the one that *ends* first wins, and among those that end together the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """A stop string that was found.

    Attributes:
        end: characters of the last fed text up to and including the stop string.
        length: characters of the stop string itself; it may begin in text that was fed earlier.
    """

    end: int
    length: int


class StopMatcher:
    """Knuth-Morris-Pratt over several patterns at once: linear in the text, whatever the patterns.

    A search of the whole text on every token would cost the square of its length, and so would a repeated search
    for the longest suffix that could still become a stop string. The automaton's state *is* that suffix.

    Args:
        patterns: non-empty strings.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [(pattern, _borders(pattern)) for pattern in patterns]
        self._states = [0] * len(patterns)
        self._first = frozenset(pattern[0] for pattern in patterns)
        self.held = 0
        """How many of the last characters could be the beginning of a stop string."""

    def feed(self, text: str, *, armed: bool = True) -> Match | None:
        """Read on. Not to be called again after a match.

        Args:
            text: what follows the text that was fed so far.
            armed: whether a stop string that is completed in this text counts.
        """
        if not self.held and self._first.isdisjoint(text):
            return None
        states = self._states
        for position, char in enumerate(text, 1):
            longest = 0
            for index, (pattern, borders) in enumerate(self._patterns):
                state = states[index]
                while state and pattern[state] != char:
                    state = borders[state - 1]
                if pattern[state] == char:
                    state += 1
                if state == len(pattern):
                    if armed:
                        longest = max(longest, state)
                    state = borders[state - 1]
                states[index] = state
            if longest:
                return Match(position, longest)
        self.held = max(states)
        return None


def _borders(pattern: str) -> list[int]:
    """For each prefix of the pattern the length of its longest proper border (prefix that is also a suffix)."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders

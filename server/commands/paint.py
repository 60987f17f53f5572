"""Showing an answer: coloured by source in a terminal, as it is elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from server.commands.api import Piece

STYLES = ("underline yellow", "bold underline green", "italic underline magenta", "reverse cyan")
"""Of experts, in the order in which they first write. No two differ by colour alone."""

CHECK, CHECK_BASE = "underline2", "red"
"""Of a token that deserves a second look: underlined twice, and the base's, which has no colour of its own, red."""


def coloured(color: str) -> bool:
    """Whether to colour, by the option ``--color``."""
    if color == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return color == "always"


class Painter:
    """Writes answers to the standard output.

    Coloured, control characters of a model are made visible: they must not steer the reader's terminal. Not coloured,
    the text is written as it came if the output is no terminal.
    """

    def __init__(self, color: str) -> None:
        self.coloured = coloured(color)
        self._console = Console(
            force_terminal=True, color_system="standard", highlight=False, soft_wrap=True, no_color=False
        )
        self._styles: dict[str, str] = {"base": ""}

    def paint(self, pieces: Iterable[Piece]) -> str:
        """Write an answer as it comes, then, in colour, who wrote how much; returns its text."""
        counts: Counter[str] = Counter()
        checks = 0
        written: list[str] = []
        started, first = time.perf_counter(), None
        finish: str | None = None
        unit = "tokens"
        try:
            for piece in pieces:
                if first is None:
                    first = time.perf_counter()
                written.append(piece.text)
                counts.update(token.source for token in piece.tokens)
                checks += sum(token.check for token in piece.tokens)
                finish = piece.finish_reason or finish
                unit = "pieces" if piece.by_characters else unit
                self._show(piece)
        finally:
            self._end("".join(written))
        if self.coloured:
            elapsed = time.perf_counter() - started
            self._sum_up(unit, counts, finish, elapsed, None if first is None else first - started, checks)
        return "".join(written)

    def _show(self, piece: Piece) -> None:
        if self.coloured and piece.tokens:
            for token in piece.tokens:
                if token.text:
                    style = self._styles.setdefault(token.source, STYLES[(len(self._styles) - 1) % len(STYLES)])
                    if token.check:
                        style = f"{style or CHECK_BASE} {CHECK}"
                    self._console.print(Text(visible(token.text), style), end="")
            return
        sys.stdout.write(visible(piece.text) if sys.stdout.isatty() else piece.text)
        sys.stdout.flush()

    def _end(self, text: str) -> None:
        # Nothing was written where the request failed.
        if text and not text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()

    def _sum_up(
        self, unit: str, counts: Counter[str], finish: str | None, seconds: float, first: float | None, checks: int
    ) -> None:
        total = counts.total()
        line = Text(style="dim")
        line.append(f"{total} {unit}")
        for source, count in counts.items():
            line.append(" · ").append(f"{count} {source}", self._styles.get(source, ""))
        if total and unit == "tokens":
            line.append(f" · deferral rate {1 - counts['base'] / total:.0%}")
        if total:
            line.append(f" · {total / seconds:.0f} {unit}/s")
        if first is not None:
            line.append(f" · first token {first * 1000:.0f} ms")
        if checks:
            line.append(" · ").append(f"{checks} to be checked", f"{CHECK} {CHECK_BASE}")
        if finish == "length":
            line.append(" · cut at --max-tokens")
        self._console.print(line)


def visible(text: str) -> str:
    """Text without control characters but newlines and tabs: the others are shown as their pictures or as U+FFFD."""
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or not (code < 0x20 or 0x7F <= code < 0xA0):
        return char
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

"""As much of PromQL as the checks need: which metrics a query names, with which labels, and what it divides by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)?\{((?:"(?:[^"\\]|\\.)*"|[^}"])*)\}')
_LABEL_LIST = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"(?<![0-9a-zA-Z_:$])[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\(|[a-zA-Z0-9_:])")
_KEYWORDS = frozenset({"and", "or", "unless", "offset", "bool", "by", "without", "on", "ignoring", "group"})
_MATCHER = re.compile(r'\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"\s*')


@dataclass(frozen=True)
class Selector:
    """A metric as a query names it, with its matchers: (label, operator, value)."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    text: str


def selectors(expr: str) -> list[Selector]:
    """Every metric that a query names, in the order of the query.

    Raises:
        ValueError: a selector that is not understood.
    """
    found: list[tuple[int, Selector]] = []
    rest = expr
    for match in _SELECTOR.finditer(expr):
        if not match[1]:
            raise ValueError(f"a selector without a metric: {match[0]}")
        matchers = _matchers(match[2])
        found.append((match.start(), Selector(match[1], matchers, match[0])))
        rest = rest[: match.start()] + " " * len(match[0]) + rest[match.end() :]
    for pattern in (_STRING, _LABEL_LIST, re.compile(r"\[[^\]]*\]")):
        rest = pattern.sub(lambda match: " " * len(match[0]), rest)
    for match in _NAME.finditer(rest):
        if match[0] not in _KEYWORDS:
            found.append((match.start(), Selector(match[0], (), match[0])))
    return [selector for _, selector in sorted(found, key=lambda item: item[0])]


def _matchers(inside: str) -> tuple[tuple[str, str, str], ...]:
    found = []
    position = 0
    while position < len(inside):
        match = _MATCHER.match(inside, position)
        if match is None:
            raise ValueError(f"matchers that are not understood: {inside!r}")
        found.append((match[1], match[2], match[3]))
        position = match.end()
        if position < len(inside) and inside[position] == ",":
            position += 1
    return tuple(found)


def grouping_labels(expr: str) -> set[str]:
    """Labels that a query groups by or matches on."""
    lists = _LABEL_LIST.findall(_STRING.sub('""', expr))
    return {label.strip() for _, labels in lists for label in labels.split(",") if label.strip()}


def counted(expr: str) -> Iterator[str]:
    """Metrics inside rate() and increase(), which are for counters only."""
    yield from re.findall(r"\b(?:rate|irate|increase)\(\s*([a-zA-Z_:][a-zA-Z0-9_:]*)", expr)


def unguarded_divisions(expr: str) -> list[str]:
    """What a query divides by that could be 0: every divisor but ``(... > 0)``."""
    text = _STRING.sub(lambda match: "_" * len(match[0]), expr)
    found = []
    for slash in re.finditer("/", text):
        rest = text[slash.end() :]
        rest = re.sub(r"^\s*(?:(?:on|ignoring|group_left|group_right)\s*\([^)]*\)\s*)*", "", rest)
        divisor = _parenthesised(rest)
        if divisor is None or re.search(r">\s*0\s*\)$", divisor) is None:
            found.append(rest[:60])
    return found


def _parenthesised(text: str) -> str | None:
    """The balanced parentheses that ``text`` begins with."""
    depth = 0
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[: position + 1] if position else None
    return None

"""EBNF grammars, as llama.cpp and xgrammar have them, for the back end.

    root ::= "answer: " (number | "none")   # a comment
    number ::= "-"? [0-9]{1,6}

A grammar without recursion becomes one regular expression, and is followed exactly. In a recursive one every rule that
does not recur is a *terminal*, which the back end reads as far as it goes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from engine.grammar.errors import FormError, shown
from engine.grammar.regex import escaped

ROOT = "root"
MAX_REPEAT = 10_000

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
      | (?P<define>(?P<defined>[A-Za-z_][\w-]*)(?:\s|\#[^\n]*)*::=)
      | (?P<name>[A-Za-z_][\w-]*)
      | (?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<set>\[(?:[^\]\\\n]|\\.)*\])
      | (?P<counted>\{\s*(?P<low>\d{1,6})\s*(?P<comma>,)?\s*(?P<high>\d{1,6})?\s*\})
      | (?P<sign>[|()*+?.])""",
    re.VERBOSE | re.ASCII,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "0": "\0"}


class Chars(NamedTuple):
    """A text, or one character of a set, as a regular expression."""

    regex: str


class Rule(NamedTuple):
    """A reference to a rule."""

    name: str


class Sequence(NamedTuple):
    """One after the other; none is the empty text."""

    items: tuple[Node, ...]


class Choice(NamedTuple):
    """One of these."""

    branches: tuple[Node, ...]


class Repeat(NamedTuple):
    """So many times; no upper limit is None."""

    item: Node
    low: int
    high: int | None


Node = Chars | Rule | Sequence | Choice | Repeat


def translated(grammar: str) -> tuple[str | None, str | None]:
    """A regular expression, or a Lark grammar: (regex, None) or (None, lark).

    Raises:
        FormError: it cannot be read, names a rule that does not exist, or has no finite text.
    """
    try:
        rules = _Reader(grammar).rules()
        _check(rules)
        recursive = _recursive(rules)
        if ROOT not in recursive:
            return _Regexes(rules, recursive).of(Rule(ROOT)), None
        return None, _lark(rules, recursive)
    except RecursionError:
        raise FormError("the grammar is nested too deeply") from None


class _Reader:
    """Recursive descent over the tokens of a grammar."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[re.Match[str]] = []
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None:
                raise self._error(position)
            if token.lastgroup != "space":
                self._tokens.append(token)
            position = token.end()
        self._next = 0

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while (token := self._peek()) is not None:
            name = token["defined"]
            if name is None:
                raise self._error(token.start())
            if name in rules:
                raise FormError(f"the grammar defines rule {shown(name)} twice")
            self._next += 1
            rules[name] = self._choice()
        return rules

    def _peek(self) -> re.Match[str] | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, sign: str) -> bool:
        token = self._peek()
        if token is None or token["sign"] != sign:
            return False
        self._next += 1
        return True

    def _choice(self) -> Node:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else Choice(tuple(branches))

    def _sequence(self) -> Node:
        items: list[Node] = []
        while (item := self._item()) is not None:
            items.append(self._repeated(item))
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _item(self) -> Node | None:
        token = self._peek()
        if token is None or token["define"] or token["sign"] in ("|", ")"):
            return None
        self._next += 1
        if token["name"]:
            return Rule(token["name"])
        if token["text"]:
            return Chars(escaped(self._unescaped(token["text"][1:-1], token.start())))
        if token["set"]:
            return Chars(self._set(token["set"][1:-1], token.start()))
        if token["sign"] == ".":
            return Chars(r"[^\x{a}]")
        if token["sign"] == "(":
            inner = self._choice()
            if not self._take(")"):
                raise self._error(token.start())
            return inner
        raise self._error(token.start())

    def _repeated(self, item: Node) -> Node:
        while True:
            token = self._peek()
            if token is None:
                return item
            if token["counted"]:
                low = int(token["low"])
                high = int(token["high"]) if token["high"] else None if token["comma"] else low
                if high is not None and high < low:
                    raise self._error(token.start())
                if max(low, high or 0) > MAX_REPEAT:
                    raise FormError(f"the grammar repeats something more than {MAX_REPEAT} times")
                item = Repeat(item, low, high)
            elif token["sign"] in ("*", "+", "?"):
                item = Repeat(item, int(token["sign"] == "+"), 1 if token["sign"] == "?" else None)
            else:
                return item
            self._next += 1

    def _set(self, text: str, position: int) -> str:
        negated = text.startswith("^")
        chars = [(match, is_escape) for match, is_escape in self._chars(text[negated:], position)]
        if not chars:
            raise self._error(position)
        ranges = ""
        while chars:
            low = chars.pop(0)[0]
            if len(chars) >= 2 and chars[0] == ("-", False):
                high = chars[1][0]
                if high < low:
                    raise self._error(position)
                del chars[:2]
                ranges += f"\\x{{{ord(low):x}}}-\\x{{{ord(high):x}}}"
            else:
                ranges += f"\\x{{{ord(low):x}}}"
        return f"[{'^' if negated else ''}{ranges}]"

    def _unescaped(self, text: str, position: int) -> str:
        return "".join(char for char, _ in self._chars(text, position))

    def _chars(self, text: str, position: int) -> list[tuple[str, bool]]:
        chars = []
        at = 0
        while at < len(text):
            if text[at] != "\\":
                char, at, is_escape = text[at], at + 1, False
            else:
                match = _ESCAPE.match(text, at)
                if match is None:
                    raise self._error(position)
                code = match[1] or match[2] or match[3]
                at, is_escape = match.end(), True
                if code is not None:
                    number = int(code, 16)
                    if number > 0x10FFFF:
                        raise self._error(position)
                    char = chr(number)
                elif match[4].isalnum() and match[4] not in _CONTROL:
                    raise FormError(f"the grammar has the unknown escape {shown(match[0])}")
                else:
                    char = _CONTROL.get(match[4], match[4])
            if "\ud800" <= char <= "\udfff":
                raise FormError("the grammar has half of a surrogate pair")
            chars.append((char, is_escape))
        return chars

    def _error(self, position: int) -> FormError:
        line = self._text.count("\n", 0, position) + 1
        return FormError(f"the grammar cannot be read in line {line} at {shown(self._text[position:], 20)}")


def _check(rules: dict[str, Node]) -> None:
    if ROOT not in rules:
        raise FormError(f"the grammar has no rule {ROOT!r}")
    for node in rules.values():
        for name in _names(node):
            if name not in rules:
                raise FormError(f"the grammar names rule {shown(name)}, which does not exist")
    ends: set[str] = set()
    while more := {name for name, node in rules.items() if name not in ends and _ends(node, ends)}:
        ends |= more
    if without := sorted(_reached(rules, ROOT) - ends):
        raise FormError(f"the grammar's rule {shown(without[0])} has no finite text: it contains itself without end")


def _names(node: Node) -> list[str]:
    match node:
        case Rule(name):
            return [name]
        case Sequence(nodes) | Choice(nodes):
            return [name for each in nodes for name in _names(each)]
        case Repeat(item):
            return _names(item)
    return []


def _ends(node: Node, known: set[str]) -> bool:
    match node:
        case Rule(name):
            return name in known
        case Sequence(items):
            return all(_ends(item, known) for item in items)
        case Choice(branches):
            return any(_ends(branch, known) for branch in branches)
        case Repeat(item, low):
            return low == 0 or _ends(item, known)
    return True


def _reached(rules: dict[str, Node], start: str) -> set[str]:
    """Rules that a rule leads to; itself only if it recurs or is ``root``."""
    found: set[str] = {start} if start == ROOT else set()
    pending = [start]
    while pending:
        new = set(_names(rules[pending.pop()])) - found
        found |= new
        pending += new
    return found


def _recursive(rules: dict[str, Node]) -> set[str]:
    """Rules that lead back to themselves, or to such ones."""
    reached = {name: set(_names(node)) for name, node in rules.items()}
    leads = {name: _closure(name, reached) for name in rules}
    loops = {name for name in rules if name in leads[name]}
    return {name for name in rules if name in loops or leads[name] & loops}


def _closure(start: str, reached: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    pending = [start]
    while pending:
        new = reached[pending.pop()] - found
        found |= new
        pending += new
    return found


class _Regexes:
    """Regular expressions of what does not recur. Their length is bounded: rules are written out where they stand."""

    LONGEST = 1 << 20

    def __init__(self, rules: dict[str, Node], recursive: set[str]) -> None:
        self._rules = rules
        self._recursive = recursive
        self._known: dict[str, str] = {}

    def is_regular(self, node: Node) -> bool:
        return not any(name in self._recursive for name in _names(node))

    def of(self, node: Node) -> str:
        match node:
            case Chars(regex):
                return regex
            case Rule(name):
                if name not in self._known:
                    self._known[name] = f"(?:{self.of(self._rules[name])})"
                return self._known[name]
            case Sequence(items):
                regex = "".join(self.of(item) for item in items)
            case Choice(branches):
                regex = f"(?:{'|'.join(self.of(branch) for branch in branches)})"
            case Repeat(item, low, high):
                regex = f"(?:{self.of(item)}){{{low},{'' if high is None else high}}}"
        if len(regex) > self.LONGEST:
            raise FormError("the grammar is too long once its rules are written out")
        return regex


def _lark(rules: dict[str, Node], recursive: set[str]) -> str:
    regexes = _Regexes(rules, recursive)
    reached = _reached(rules, ROOT)
    # No order to tell two names apart by is lost: numbers stand for them.
    names = {name: "start" if name == ROOT else f"r{number}" for number, name in enumerate(rules)}

    def written(node: Node) -> str:
        if regexes.is_regular(node):
            return _terminal(regexes.of(node))
        match node:
            case Rule(name):
                return names[name]
            case Sequence(items):
                return _sequence(items)
            case Choice(branches):
                return f"({' | '.join(written(branch) for branch in branches)})"
            case Repeat(item, low, high):
                return f"({written(item)}){{{low},{'' if high is None else high}}}"
        raise AssertionError(node)

    def _sequence(items: tuple[Node, ...]) -> str:
        parts: list[str] = []
        regular: list[str] = []
        for item in items:
            if regexes.is_regular(item):
                regular.append(regexes.of(item))
                continue
            if regular:
                parts.append(_terminal("".join(regular)))
                regular = []
            parts.append(written(item))
        if regular:
            parts.append(_terminal("".join(regular)))
        return f"({' '.join(parts)})"

    lines = [f"{names[name]}: {written(rules[name])}" for name in rules if name in recursive and name in reached]
    return "%llguidance {}\n" + "\n".join(lines) + "\n"


def _terminal(regex: str) -> str:
    return f"/{regex}/" if regex else '""'

r"""Regular expressions in one meaning for everybody who reads them.

Back ends, JSON Schema validators and users differ in what ``\\Z``, ``\\d``, ``[a&&b]`` or ``[\\^0-9]`` mean. Here the
standard library's parser decides what an expression says, and what it says is written anew with nothing but character
sets of code points, groups and repetitions, which mean the same everywhere. Where Python and ECMAScript differ (``\\d``
beyond ASCII, ``.`` before line separators), only what both accept is written. What cannot be said that way
(assertions, references to groups) is refused by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from engine.grammar.errors import FormError

_TOP = 0x10FFFF
_DIGIT = "0-9"
_WORD = "0-9A-Za-z_"
_SPACE = r"\x{9}-\x{d}\x{20}"
_CATEGORIES = {
    sre.CATEGORY_DIGIT: _DIGIT,
    sre.CATEGORY_WORD: _WORD,
    sre.CATEGORY_SPACE: _SPACE,
    # Beyond ASCII the two languages differ, so neither the set nor its complement has any of it.
    sre.CATEGORY_NOT_DIGIT: r"[^0-9\p{N}]",
    sre.CATEGORY_NOT_WORD: r"[^0-9A-Za-z_\p{L}\p{N}]",
    sre.CATEGORY_NOT_SPACE: r"[^\x{9}-\x{d}\x{1c}-\x{20}\x{85}\x{feff}\p{Z}]",
}
_NEGATED = {
    sre.CATEGORY_DIGIT: r"\p{N}",
    sre.CATEGORY_WORD: r"_\p{L}\p{N}",
    sre.CATEGORY_SPACE: r"\x{9}-\x{d}\x{1c}-\x{20}\x{85}\x{feff}\p{Z}",
}
"""What a negated set must leave out so that both languages agree."""

ANYTHING = r"[\x{0}-\x{10ffff}]*"
_FOLDS = {"k": "\u212a", "s": "\u017f", "i": "\u0130\u0131"}
"""Letters beyond ASCII that Python takes for an ASCII one where case is ignored."""


def canonical(pattern: str, *, search: bool) -> str:
    """The expression written anew, for a whole text.

    Args:
        search: the pattern may match anywhere in the text (JSON Schema's ``pattern``), else it matches all of it.

    Raises:
        FormError: it is no regular expression, or says what cannot be followed.
    """
    if "\x00" in pattern:
        raise FormError("the regular expression has a NUL character")
    with warnings.catch_warnings():
        # A future meaning of nested sets; what counts is today's.
        warnings.simplefilter("ignore")
        try:
            tree = parser.parse(pattern)
        except re.error as error:
            raise FormError(f"the regular expression cannot be read: {error}") from None
        except (OverflowError, RecursionError):
            raise FormError("the regular expression is nested too deeply or counts too far") from None
    writer = _Writer(dot="\n\r\u2028\u2029" if search else "\n")
    try:
        return writer.whole(tree, tree.state.flags, search=search)
    except RecursionError:
        raise FormError("the regular expression is nested too deeply") from None


def escaped(text: str) -> str:
    """A regular expression for exactly this text."""
    return "".join(_char(ord(char)) for char in text)


def other_than(names: Sequence[str]) -> str:
    """A regular expression for every text but these; its length is about theirs together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name:
            groups.setdefault(name[0], []).append(name[1:])
    if not groups:
        return ANYTHING if not names else f"[\\x{{0}}-\\x{{10ffff}}]{ANYTHING}"
    firsts = "".join(_char(ord(first)) for first in groups)
    branches = [f"[^{firsts}]{ANYTHING}"]
    branches += [f"{_char(ord(first))}{other_than(rest)}" for first, rest in groups.items()]
    return f"(?:{'|'.join(branches)}){'' if '' in names else '?'}"


def _char(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:x}}}"


def _range(low: int, high: int) -> str:
    # Surrogates are no characters of any text.
    parts = [(low, min(high, 0xD7FF)), (max(low, 0xE000), high)]
    return "".join(f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in parts if a <= b)


class _Writer:
    """Writes a parsed expression.

    Args:
        dot: what ``.`` does not match.
    """

    def __init__(self, dot: str) -> None:
        self._dot = dot

    def whole(self, tree: Any, flags: int, *, search: bool) -> str:
        self._check(flags)
        items = list(tree)
        # A group around everything changes nothing.
        branches = [self._branch(branch, flags, search=search) for branch in self._alternatives(items)]
        return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"

    def _alternatives(self, items: list[Any]) -> list[list[Any]]:
        if len(items) == 1:
            operator, argument = items[0]
            if operator is sre.BRANCH:
                return [list(branch) for branch in argument[1]]
            if operator is sre.SUBPATTERN and not argument[1] and not argument[2]:
                return self._alternatives(list(argument[3]))
        return [items]

    def _branch(self, items: list[Any], flags: int, *, search: bool) -> str:
        begins = ends = not search
        while items and items[0][0] is sre.AT and items[0][1] in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            items, begins = items[1:], True
        while items and items[-1][0] is sre.AT and items[-1][1] in (sre.AT_END, sre.AT_END_STRING):
            items, ends = items[:-1], True
        text = self._sequence(items, flags)
        return f"{'' if begins else ANYTHING}{text}{'' if ends else ANYTHING}"

    def _sequence(self, items: Any, flags: int) -> str:
        return "".join(self._item(operator, argument, flags) for operator, argument in items)

    def _item(self, operator: Any, argument: Any, flags: int) -> str:
        if operator is sre.LITERAL:
            text = self._literal(argument, flags)
            return f"[{text}]" if flags & re.I else text
        if operator is sre.NOT_LITERAL:
            return f"[^{self._literal(argument, flags, negated=True)}]"
        if operator is sre.ANY:
            return r"[\x{0}-\x{10ffff}]" if flags & re.S else f"[^{escaped(self._dot)}]"
        if operator is sre.IN:
            return self._set(argument, flags)
        if operator is sre.BRANCH:
            return f"(?:{'|'.join(self._sequence(branch, flags) for branch in argument[1])})"
        if operator is sre.SUBPATTERN:
            _, added, removed, inner = argument
            flags = (flags | added) & ~removed
            self._check(flags)
            return f"(?:{self._sequence(inner, flags)})"
        if operator in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, inner = argument
            upper = "" if high == sre.MAXREPEAT else str(int(high))
            return f"(?:{self._sequence(inner, flags)}){{{int(low)},{upper}}}"
        raise FormError(f"the regular expression has {_name(operator, argument)}, which is not supported")

    def _literal(self, code: int, flags: int, *, negated: bool = False) -> str:
        if 0xD800 <= code <= 0xDFFF:
            raise FormError("the regular expression has half of a surrogate pair")
        if not flags & re.I:
            return _char(code)
        if code > 127:
            raise FormError("the regular expression ignores the case of a letter beyond ASCII, which is not supported")
        char = chr(code)
        chars = dict.fromkeys((char, char.lower(), char.upper(), *(_FOLDS.get(char.lower(), "") if negated else "")))
        return "".join(_char(ord(each)) for each in chars)

    def _set(self, items: Any, flags: int) -> str:
        negated = bool(items) and items[0][0] is sre.NEGATE
        ranges: list[str] = []
        sets: list[str] = []
        for operator, argument in items[negated:]:
            if operator is sre.LITERAL:
                ranges.append(self._literal(argument, flags, negated=negated))
            elif operator is sre.RANGE:
                ranges.append(self._range(argument[0], argument[1], flags, negated=negated))
            elif operator is sre.CATEGORY and argument in _NEGATED:
                ranges.append(_CATEGORIES[argument] + (_NEGATED[argument] if negated else ""))
            elif operator is sre.CATEGORY and not negated:
                sets.append(_CATEGORIES[argument])
            else:
                raise FormError("the regular expression negates a negated class, which is not supported")
        if negated:
            return f"[^{''.join(ranges)}]"
        if ranges:
            sets.append(f"[{''.join(ranges)}]")
        return sets[0] if len(sets) == 1 else f"(?:{'|'.join(sets)})"

    def _range(self, low: int, high: int, flags: int, *, negated: bool) -> str:
        text = _range(low, high)
        if not flags & re.I:
            return text
        if high > 127:
            raise FormError("the regular expression ignores the case of a letter beyond ASCII, which is not supported")
        letters = [chr(code) for code in range(low, high + 1) if chr(code).isalpha()]
        return text + "".join(self._literal(ord(letter), flags, negated=negated) for letter in letters)

    def _check(self, flags: int) -> None:
        known = re.I | re.S | re.U | re.X
        if flags & ~known:
            raise FormError("the regular expression sets a flag other than i, s and x")


def _name(operator: Any, argument: Any) -> str:
    if operator is sre.AT:
        if argument in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            return "a word boundary"
        return "an anchor other than at its beginning or end"
    return {
        sre.ASSERT: "a look-ahead or look-behind",
        sre.ASSERT_NOT: "a look-ahead or look-behind",
        sre.GROUPREF: "a reference to a group",
        sre.GROUPREF_EXISTS: "a condition on a group",
        sre.ATOMIC_GROUP: "an atomic group",
        sre.POSSESSIVE_REPEAT: "a possessive repetition",
    }.get(operator, "a construct")

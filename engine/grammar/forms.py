"""A form as a grammar of the back end."""

from __future__ import annotations

import json
import math
from typing import Any

from engine.grammar.ebnf import translated
from engine.grammar.errors import FormError, shown
from engine.grammar.regex import canonical, escaped
from engine.grammar.schema import Schema, normalised
from engine.types import StructuredOutputs

MAX_CHARACTERS = 64 * 1024
"""Of a form in all: reading one takes time."""


def grammar_of(form: StructuredOutputs, *, any_whitespace: bool = True) -> str:
    """The grammar in llguidance's own notation.

    Args:
        any_whitespace: JSON may have blanks and line breaks where it allows them.

    Raises:
        FormError: what is wrong with the form; the message is one line.
    """
    from llguidance import LLMatcher

    given = (form.json, form.json_object or None, form.regex, form.choice, form.grammar)
    if sum(each is not None for each in given) != 1:
        raise FormError("exactly one of json, json_object, regex, choice and grammar must be given")
    if _size(form) > MAX_CHARACTERS:
        raise FormError(f"the form has more than {MAX_CHARACTERS} characters in all")
    if form.json is not None or form.json_object:
        schema = normalised(parsed(form.json)) if form.json is not None else {"type": "object"}
        return json_grammar(schema, any_whitespace=any_whitespace)
    if form.grammar is not None:
        if _is_lark(form.grammar):
            if "%json" in form.grammar:
                raise FormError("a Lark grammar must not have %json: give the schema as json")
            return str(LLMatcher.grammar_from_lark(form.grammar))
        regex, lark = translated(form.grammar)
        if lark is not None:
            return str(LLMatcher.grammar_from_lark(lark))
        assert regex is not None
    elif form.choice is not None:
        if not form.choice:
            raise FormError("choice must have at least one text")
        regex = f"(?:{'|'.join(escaped(text) for text in dict.fromkeys(form.choice))})"
    else:
        assert form.regex is not None
        regex = canonical(form.regex, search=False)
    return str(LLMatcher.grammar_from_regex(regex))


def json_grammar(schema: Schema, *, any_whitespace: bool) -> str:
    """The grammar of a schema that has been normalised."""
    from llguidance import LLMatcher

    return str(
        LLMatcher.grammar_from_json_schema(
            json.dumps({} if isinstance(schema, bool) else schema),
            overrides={"whitespace_flexible": any_whitespace, "lenient": False, "coerce_one_of": False},
        )
    )


def _size(form: StructuredOutputs) -> int:
    texts = (form.json, form.regex, form.grammar, *(form.choice or ()))
    return sum(len(text) for text in texts if text is not None)


def parsed(text: str) -> Any:
    """A schema's JSON.

    Raises:
        FormError: it is none, or has a text or a number that other readers of JSON do not have.
    """

    def refused(constant: str) -> Any:
        raise FormError(f"the schema has {constant}, which is no JSON")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise FormError(f"the schema has the number {shown(digits, 20)}, which is too large")
        return value

    def whole_number(digits: str) -> int:
        number(digits)
        return int(digits)

    try:
        schema = json.loads(text, parse_constant=refused, parse_float=number, parse_int=whole_number)
        json.dumps(schema, ensure_ascii=False).encode()
    except FormError:
        raise
    except UnicodeEncodeError:
        raise FormError("the schema has half of a surrogate pair in a text") from None
    except ValueError as error:
        raise FormError(f"the schema is no JSON: {error}") from None
    except RecursionError:
        raise FormError("the schema is nested too deeply") from None
    return schema


def _is_lark(grammar: str) -> bool:
    """A Lark grammar names its rules with a colon, and begins at ``start``."""
    lines = [line.strip() for line in grammar.splitlines()]
    return "::=" not in grammar and any(line.startswith(("start:", "start :", "%llguidance")) for line in lines)

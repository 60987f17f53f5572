"""What the value of a JSON Schema keyword must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")


def listed(value: Any) -> list[Any]:
    """The values of a keyword that may have one, several in a list, or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return None if good else f"must be a whole number from 0 to {2**31 - 1}"


def _number(value: Any) -> str | None:
    return None if _is_number(value) else "must be a number"


def _positive(value: Any) -> str | None:
    return None if _is_number(value) and value > 0 else "must be a number greater than 0"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be a string"


def _patterns(value: Any) -> str | None:
    # Merged schemas may have several.
    return None if all(isinstance(each, str) for each in listed(value)) else "must be a string"


def _texts(value: Any) -> str | None:
    good = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return None if good else "must be a list of strings"


def _schemas(value: Any) -> str | None:
    return None if isinstance(value, list) and value else "must be a list of at least one schema"


def _listed_schemas(value: Any) -> str | None:
    return None if isinstance(value, list) else "must be a list of schemas"


def _named_schemas(value: Any) -> str | None:
    return None if isinstance(value, dict) else "must be an object of schemas"


def _schema(value: Any) -> str | None:
    return None if isinstance(value, dict | bool) else "must be a schema"


def _values(value: Any) -> str | None:
    return _value(value) if isinstance(value, list) and value else "must be a list of at least one value"


def _value(value: Any) -> str | None:
    """The back end writes numbers as floats do."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, int | float) and abs(part) > 2**53:
            return "has a number beyond 2**53, which is not supported"
        pending += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return None


def _type(value: Any) -> str | None:
    good = isinstance(value, str | list) and value and all(each in TYPES for each in listed(value))
    return None if good else f"must be one or more of {', '.join(TYPES)}"


CHECKS: dict[str, Callable[[Any], str | None]] = {
    "$ref": _text,
    "additionalProperties": _schema,
    "allOf": _schemas,
    "anyOf": _schemas,
    "const": _value,
    "enum": _values,
    "exclusiveMaximum": _number,
    "exclusiveMinimum": _number,
    "format": _text,
    "items": _schema,
    "maxItems": _count,
    "maxLength": _count,
    "maxProperties": _count,
    "maximum": _number,
    "minItems": _count,
    "minLength": _count,
    "minProperties": _count,
    "minimum": _number,
    "multipleOf": _positive,
    "oneOf": _schemas,
    "pattern": _patterns,
    "patternProperties": _named_schemas,
    "prefixItems": _listed_schemas,
    "properties": _named_schemas,
    "required": _texts,
    "type": _type,
}
"""By keyword: None, or what is wrong with its value."""

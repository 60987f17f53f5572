"""JSON values as JSON Schema compares them."""

from __future__ import annotations

from typing import Any


def key_of(value: Any) -> Any:
    """Equal keys for equal values: 1 and 1.0 are equal, 1 and true are not, and the order of members is none."""
    if isinstance(value, bool) or value is None:
        return (type(value).__name__, value)
    if isinstance(value, int | float):
        return ("number", value)
    if isinstance(value, str):
        return ("string", value)
    if isinstance(value, list):
        return ("array", tuple(key_of(item) for item in value))
    return ("object", frozenset((name, key_of(item)) for name, item in value.items()))


def type_of(value: Any) -> str:
    """Its type by JSON Schema's names; a whole number is an integer."""
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    return {float: "number", str: "string", list: "array"}.get(type(value), "object")


def types_of(schema: dict[str, Any]) -> frozenset[str]:
    """Types that a schema's values may have, "number" written out as "integer" and "number"."""
    listed = schema.get("type")
    if listed is None:
        types = {"null", "boolean", "object", "array", "number", "integer", "string"}
    else:
        types = {listed} if isinstance(listed, str) else set(listed)
    if "number" in types:
        types.add("integer")
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        types &= {type_of(value) for value in values}
    return frozenset(types)

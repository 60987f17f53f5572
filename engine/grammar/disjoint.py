"""Whether two schemas can be told apart by any answer."""

from __future__ import annotations

from typing import Any

from engine.grammar.values import key_of, types_of


def are_disjoint(one: Any, other: Any) -> bool:
    """True only if no value satisfies both; False where that cannot be seen at a glance.

    Args:
        one: well-formed or not, as users write them; its own ``$ref`` and its properties' are resolved.
        other: the same.
    """
    if one is False or other is False:
        return True
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    try:
        shared = types_of(one) & types_of(other)
    except TypeError:
        return False
    if not shared:
        return True
    values = _values(one), _values(other)
    if values[0] is not None and values[1] is not None:
        return values[0].isdisjoint(values[1])
    if shared != {"object"}:
        return False
    return _objects_differ(one, other)


def _values(schema: dict[str, Any]) -> set[Any] | None:
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return {key_of(value) for value in listed} if isinstance(listed, list) else None


def _objects_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    properties = one.get("properties", {}), other.get("properties", {})
    required = one.get("required", []), other.get("required", [])
    if not all(isinstance(each, dict) for each in properties) or not all(isinstance(each, list) for each in required):
        return False
    for schema, names, wanted in ((one, properties[0], required[1]), (other, properties[1], required[0])):
        closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
        if closed and not set(wanted) <= names.keys():
            return True
    both = [name for name in required[0] if name in required[1]]
    return any(are_disjoint(properties[0].get(name, True), properties[1].get(name, True)) for name in both)

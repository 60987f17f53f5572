"""Two schemas that both hold, as one."""

from __future__ import annotations

import math
from typing import Any

from engine.grammar.errors import FormError
from engine.grammar.values import key_of

Schema = dict[str, Any] | bool

_LARGEST = ("minItems", "minLength", "minProperties", "minimum", "exclusiveMinimum")
_SMALLEST = ("maxItems", "maxLength", "maxProperties", "maximum", "exclusiveMaximum")
_OBJECT = ("additionalProperties", "patternProperties", "properties")
_ARRAY = ("items", "prefixItems")


def merged(one: Schema, other: Schema, path: str) -> Schema:
    """What satisfies the result satisfies both. Neither has combining keywords at its top; subschemas may.

    Raises:
        FormError: two keywords that cannot be told in one.
    """
    if one is True or one == {}:
        return other
    if other is True or other == {}:
        return one
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    both = dict(one)
    for key, value in other.items():
        if key in _OBJECT or key in _ARRAY:
            continue
        if key not in both:
            both[key] = value
        elif key in _LARGEST:
            both[key] = max(both[key], value)
        elif key in _SMALLEST:
            both[key] = min(both[key], value)
        elif not _meet(both, key, value, path):
            return False
    if "const" in both and "enum" in both:
        if key_of(both["const"]) not in {key_of(value) for value in both["enum"]}:
            return False
        del both["enum"]
    _merge_arrays(both, one, other)
    _merge_objects(both, one, other, path)
    return both


def _meet(both: dict[str, Any], key: str, value: Any, path: str) -> bool:
    """Put what a keyword says in both places into ``both``; False if nothing is left."""
    mine = both[key]
    if key == "type":
        both[key] = _types(mine, value)
        return bool(both[key])
    if key == "enum":
        known = {key_of(each) for each in value}
        both[key] = [each for each in mine if key_of(each) in known]
        return bool(both[key])
    if key == "const":
        return bool(key_of(mine) == key_of(value))
    if key == "required":
        both[key] = list(dict.fromkeys([*mine, *value]))
    elif key == "pattern":
        both[key] = list(dict.fromkeys([*_listed(mine), *_listed(value)]))
    elif key == "multipleOf" and isinstance(mine, int) and isinstance(value, int):
        both[key] = math.lcm(mine, value)
    elif mine != value:
        raise FormError(f"{key} at {path} is given twice, which is not supported")
    return True


def _types(one: Any, other: Any) -> Any:
    mine, theirs = set(_listed(one)), set(_listed(other))
    left = mine & theirs
    for narrow, wide in ((mine, theirs), (theirs, mine)):
        if "integer" in narrow and "number" in wide and "number" not in left:
            left.add("integer")
    return next(iter(left)) if len(left) == 1 else sorted(left)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _all_of(*schemas: Any) -> Any:
    said = [schema for schema in schemas if schema is not True and schema != {}]
    if any(schema is False for schema in said):
        return False
    return {"allOf": said} if len(said) > 1 else said[0] if said else True


def _merge_arrays(both: dict[str, Any], one: dict[str, Any], other: dict[str, Any]) -> None:
    if not any(key in schema for key in _ARRAY for schema in (one, other)):
        return
    prefixes = one.get("prefixItems", []), other.get("prefixItems", [])
    rests = one.get("items", True), other.get("items", True)
    length = max(map(len, prefixes))
    at = [
        [prefix[number] if number < len(prefix) else rest for number in range(length)]
        for prefix, rest in zip(prefixes, rests, strict=True)
    ]
    if length:
        both["prefixItems"] = [_all_of(*pair) for pair in zip(*at, strict=True)]
    both["items"] = _all_of(*rests)


def _merge_objects(both: dict[str, Any], one: dict[str, Any], other: dict[str, Any], path: str) -> None:
    if not any(key in other for key in _OBJECT):
        return
    if not any(key in one for key in _OBJECT):
        both.update({key: other[key] for key in _OBJECT if key in other})
        return
    if "patternProperties" in one or "patternProperties" in other:
        raise FormError(f"patternProperties at {path} beside another schema of an object is not supported")
    properties = one.get("properties", {}), other.get("properties", {})
    rests = one.get("additionalProperties", True), other.get("additionalProperties", True)
    both["properties"] = {
        name: _all_of(*(mine.get(name, rest) for mine, rest in zip(properties, rests, strict=True)))
        for name in {**properties[0], **properties[1]}
    }
    if "additionalProperties" in one or "additionalProperties" in other:
        both["additionalProperties"] = _all_of(*rests)

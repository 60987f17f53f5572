"""Whether a schema has an answer that ends."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any] | bool


def is_productive(schema: Schema, definitions: dict[str, Schema]) -> bool:
    """False if every answer would have to contain another one without end.

    Only recursion is looked at; whether a pattern or a bound leaves anything is the back end's to see.

    Args:
        schema: in the form that :mod:`engine.grammar.schema` writes.
        definitions: what its ``#/$defs/...`` refer to.
    """
    known: set[str] = set()
    while True:
        more = {name for name, each in definitions.items() if name not in known and _ends(each, known)}
        if not more:
            return _ends(schema, known)
        known |= more


def _ends(schema: Schema, known: set[str]) -> bool:
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2] in known
    if "anyOf" in schema:
        return any(_ends(branch, known) for branch in schema["anyOf"])
    types = schema.get("type")
    listed = types if isinstance(types, list) else [types]
    return any(_type_ends(each, schema, known) for each in listed)


def _type_ends(name: str | None, schema: dict[str, Any], known: set[str]) -> bool:
    if name == "object":
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(_ends(properties.get(required, rest), known) for required in schema.get("required", []))
    if name == "array":
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        needed = schema.get("minItems", 0)
        return all(_ends(each, known) for each in [*prefix, items][: min(needed, len(prefix) + 1)])
    return True

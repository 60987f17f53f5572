"""Everything that a client may send has a limit: no list, string, map or number of the API's own document is unbounded.

What has no limit of its own is bounded by the size of the body only, which is megabytes: enough to keep everybody else
waiting where each element costs something.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import Build

BOUNDED_ELSEWHERE = {
    # By the context, which is checked before anything is computed; texts are tokenised in threads of their own.
    "CompletionRequest.prompt",
    "TextPart.text",
    "Message.content",
    # By MAX_GRAMMAR_LENGTH, as text.
    "JsonSchema.schema",
    "StructuredOutputsOptions.json",
}
"""Where the limit is not one of JSON Schema's keywords."""


def unbounded(where: str, schema: dict[str, Any]) -> Iterator[str]:
    """Each place below a schema where any number of things may stand."""
    if "$ref" in schema or "const" in schema or "enum" in schema:
        return
    for key in ("anyOf", "oneOf", "allOf"):
        for option in schema.get(key, ()):
            yield from unbounded(where, option)
    kind = schema.get("type")
    if kind == "string" and "maxLength" not in schema and "pattern" not in schema:
        yield f"{where}: a string"
    if kind == "array":
        if "maxItems" not in schema:
            yield f"{where}: a list"
        yield from unbounded(f"{where}[]", schema.get("items", {}))
    if kind == "object" and "properties" not in schema:
        if "maxProperties" not in schema:
            yield f"{where}: a map"
        values = schema.get("additionalProperties")
        if isinstance(values, dict):
            yield from unbounded(f"{where}{{}}", values)
    if kind == "integer" and not {"maximum", "exclusiveMaximum"} & schema.keys():
        yield f"{where}: an integer"
    for name, value in schema.get("properties", {}).items():
        yield from unbounded(f"{where}.{name}", value)


def requests(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schemas that request bodies are made of, by name."""
    schemas: dict[str, dict[str, Any]] = document["components"]["schemas"]
    found: dict[str, dict[str, Any]] = {}

    def take(value: object) -> None:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found[name] = schemas[name]
                take(schemas[name])
            for inner in value.values():
                take(inner)
        elif isinstance(value, list):
            for inner in value:
                take(inner)

    for path in document["paths"].values():
        for operation in path.values():
            take(operation.get("requestBody", {}))
    return found


async def test_every_list_string_map_and_integer_has_a_limit(build: Build) -> None:
    house = await build()
    bodies = requests((await house.http.get("/openapi.json")).json())
    assert {"CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest", "CollaborationOptions"} <= set(
        bodies
    )
    found = [line for name, schema in bodies.items() for line in unbounded(name, schema)]
    missing = [line for line in found if line.partition(":")[0].split("[")[0] not in BOUNDED_ELSEWHERE]
    assert missing == [], "\n".join(missing)


@pytest.mark.parametrize(
    ("schema", "count"),
    [
        ({"type": "string"}, 1),
        ({"type": "string", "maxLength": 3}, 0),
        ({"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}, 2),
        ({"type": "object", "additionalProperties": {"type": "string", "maxLength": 3}}, 1),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {}, "maxItems": 3}}}, 0),
    ],
)
def test_what_is_unbounded_is_found(schema: dict[str, Any], count: int) -> None:
    assert len(list(unbounded("X", schema))) == count

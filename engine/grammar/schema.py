r"""JSON Schema for the back end, keyword by keyword: what it says, or an error that names the keyword and where.

The back end is llguidance, which heeds or refuses every keyword that it knows (measured on the public
JSON-Schema-Test-Suite: no answer that a validator refuses). What is left is done here, on the schema itself:

- Keywords that it does not have are refused with their place, and the few cases in which they say nothing are dropped.
- An object whose ``additionalProperties`` is not given has the declared properties only, as in other servers. Where
  more are allowed, their names are written as a pattern that excludes the declared ones: left to itself the back end
  lets ``"\\u0061"`` through as another name than ``"a"``.
- Keywords beside ``$ref``, ``allOf``, ``anyOf`` and ``oneOf`` hold for every branch (:mod:`engine.grammar.merge`).
- Patterns are rewritten so that they mean the same to every validator (:mod:`engine.grammar.regex`).
- Bounds that floats cannot tell from their neighbours move by 1e-15 of their size.
- What no finite answer satisfies, ``{"$ref": "#"}`` for one, is refused (:mod:`engine.grammar.productive`).

An answer may be narrower than what the schema allows, never wider. Unknown keywords are annotations, as the standard
has it; so is a ``format`` that is not among :data:`~engine.grammar.formats.FORMATS`.
"""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import unquote

from engine.grammar.disjoint import are_disjoint
from engine.grammar.errors import FormError, shown
from engine.grammar.formats import FORMATS
from engine.grammar.keywords import CHECKS, listed
from engine.grammar.merge import merged
from engine.grammar.productive import is_productive
from engine.grammar.regex import canonical, other_than

MAX_PARTS = 20_000
"""Subschemas, once branches are written out."""

MAX_OPTIONAL_PROPERTIES = 1000
"""Of one object; at every step each of them may come next."""

MAX_MULTIPLE = 10**6
"""Of ``multipleOf``: the back end counts remainders."""

UNSUPPORTED = frozenset(
    (
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "not",
        "unevaluatedItems",
        "uniqueItems",
    )
)

_SAYS_NOTHING: dict[str, Any] = {
    "dependencies": {},
    "dependentRequired": {},
    "dependentSchemas": {},
    "not": False,
    "unevaluatedItems": True,
    "uniqueItems": False,
}
"""With these values they exclude no answer."""

_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_VALUES = ("const", "enum", "format", "maxLength", "minLength", "multipleOf", "pattern", "type")
_OF_STRINGS = ("allOf", "maxLength", "minLength", "pattern")
_BOUNDS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum")
_ARRAYS = ("items", "maxItems", "minItems", "prefixItems")
_OBJECTS = (
    "additionalProperties",
    "maxProperties",
    "minProperties",
    "patternProperties",
    "properties",
    "required",
)
_HEEDED = frozenset((*_VALUES, *_BOUNDS, *_ARRAYS, *_OBJECTS))

Schema = dict[str, Any] | bool


def normalised(schema: Any, strings: list[tuple[str, Schema]] | None = None) -> Schema:
    """The schema as the back end takes it; what it allows is allowed by the original.

    Args:
        schema: parsed JSON.
        strings: gets every part that asks several things of a string at once (a pattern, a format, a length), with its
            path. What the back end can say of such a part it says of the whole schema.

    Raises:
        FormError: what cannot be followed to the letter.
    """
    writer = _Writer(schema)
    try:
        written = writer.write()
    except RecursionError:
        raise FormError("the schema is nested too deeply") from None
    if strings is not None:
        strings += writer.strings
    return written


class _Writer:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._names: dict[str, str] = {}
        self._definitions: dict[str, Schema] = {}
        self._parts = 0
        self.strings: list[tuple[str, Schema]] = []

    def write(self) -> Schema:
        written = self._schema(self._root, "#")
        pending = dict(self._names)
        while pending:
            for pointer, name in pending.items():
                self._definitions[name] = self._schema(self._target(pointer, "#"), pointer)
            pending = {p: n for p, n in self._names.items() if n not in self._definitions}
        if not is_productive(written, self._definitions):
            raise FormError("the schema has no finite answer: it requires itself, or nothing satisfies it")
        if self._definitions and isinstance(written, dict):
            return {**written, "$defs": self._definitions}
        return written

    # -- one schema -------------------------------------------------------------------------------------------

    def _schema(self, node: Any, path: str) -> Schema:
        """A schema and all that it combines."""
        self._count()
        node = self._checked(node, path)
        if isinstance(node, bool):
            return node
        if set(node) == {"$ref"}:
            return {"$ref": f"#/$defs/{self._name(node['$ref'], path)}"}
        members = [member for member in node.get("allOf", []) if member not in (True, {})]
        if set(node) == {"allOf"} and len(members) == 1:
            return self._schema(members[0], path)
        plain, choices = self._split([node], path, ())
        if plain is False:
            return False
        if not choices:
            return self._plain(plain, path)
        branches, choices = choices[0], choices[1:]
        rest = [] if plain in (True, {}) else [plain]
        written = [
            self._schema({"allOf": [*rest, *({"anyOf": each} for each in choices), branch]}, path)
            if rest or choices
            else self._schema(branch, path)
            for branch in branches
        ]
        possible = [branch for branch in written if branch is not False]
        return {"anyOf": possible} if possible else False

    def _split(self, nodes: list[Any], path: str, within: tuple[str, ...]) -> tuple[Schema, list[list[Any]]]:
        """All that holds together, as one schema without combining keywords, and the choices that are left."""
        plain: Schema = True
        choices: list[list[Any]] = []
        for raw in nodes:
            self._count()
            node = self._checked(raw, path)
            if isinstance(node, bool):
                plain = plain if node else False
                continue
            plain = merged(plain, {key: value for key, value in node.items() if key not in _COMBINING}, path)
            inner: list[tuple[list[Any], tuple[str, ...]]] = [(node.get("allOf", []), within)]
            if "$ref" in node:
                pointer = node["$ref"]
                if pointer in within:
                    raise FormError(f"$ref at {path} refers to itself beside other keywords, which is not supported")
                inner.append(([self._target(pointer, path)], (*within, pointer)))
            for members, inside in inner:
                if members:
                    part, more = self._split(members, path, inside)
                    plain = merged(plain, part, path)
                    choices += more
            for keyword in ("anyOf", "oneOf"):
                if keyword in node:
                    if keyword == "oneOf":
                        self._check_disjoint(node[keyword], path)
                    choices.append(node[keyword])
        return plain, choices

    def _check_disjoint(self, branches: list[Any], path: str) -> None:
        """Only where no answer fits two branches does oneOf mean what anyOf means."""
        resolved = [self._resolved(branch, path) for branch in branches]
        for number, one in enumerate(resolved):
            for other in resolved[number + 1 :]:
                self._count()
                if not are_disjoint(one, other):
                    raise FormError(
                        f"oneOf at {path} has branches that may overlap, which is not supported: use anyOf, or give "
                        "each branch a required property with a constant of its own"
                    )

    def _resolved(self, node: Any, path: str) -> Any:
        seen = set()
        while isinstance(node, dict) and set(node) & {"$ref"} and node["$ref"] not in seen:
            seen.add(node["$ref"])
            node = self._target(node["$ref"], path)
        if isinstance(node, dict) and isinstance(node.get("properties"), dict):
            properties = {name: self._resolved(each, path) for name, each in node["properties"].items()}
            return {**node, "properties": properties}
        return node

    def _plain(self, node: Schema, path: str) -> Schema:
        """A schema without combining keywords."""
        if isinstance(node, bool):
            return node
        written = {key: value for key, value in node.items() if key in _VALUES and key not in ("format", "pattern")}
        patterns = [f"^(?:{_canonical(pattern, path)})$" for pattern in listed(node.get("pattern"))]
        if (form := node.get("format")) in FORMATS:
            patterns.append(f"^(?:{canonical(FORMATS[form], search=False)})$")
        if patterns:
            written["pattern"] = patterns[0]
            if patterns[1:]:
                written["allOf"] = [{"pattern": pattern} for pattern in patterns[1:]]
        asked: dict[str, Any] = {key: written[key] for key in _OF_STRINGS if key in written}
        if len(asked) > 1:
            self.strings.append((path, {"type": "string", **asked}))
        self._numbers(node, written, path)
        for key in ("minItems", "maxItems", "minProperties", "maxProperties"):
            if key in node:
                written[key] = node[key]
        if "prefixItems" in node:
            written["prefixItems"] = [
                self._schema(item, f"{path}/prefixItems/{number}") for number, item in enumerate(node["prefixItems"])
            ]
        if "items" in node:
            written["items"] = self._schema(node["items"], f"{path}/items")
        self._object(node, written, path)
        return written

    def _numbers(self, node: dict[str, Any], written: dict[str, Any], path: str) -> None:
        only_integers = node.get("type") == "integer"
        for key in _BOUNDS:
            if key not in node:
                continue
            value = node[key]
            exclusive, lower = key.startswith("exclusive"), key.endswith("inimum")
            target = "minimum" if lower else "maximum"
            if only_integers:
                value = math.ceil(value) if lower else math.floor(value)
                if exclusive and value == node[key]:
                    value += 1 if lower else -1
            elif exclusive:
                # As text a number may be nearer to the bound than any float but the bound itself.
                value += (1 if lower else -1) * max(abs(value), 1) * 1e-15
            if abs(value) >= 1e15:
                if not (lower and value < 0) and not (not lower and value > 0):
                    raise FormError(f"{key} at {path} is beyond 1e15, which is not supported")
                value = math.copysign(10**15, value)
            if target not in written or (value > written[target]) == lower:
                written[target] = int(value) if value == int(value) else value
        if "multipleOf" in node and node["multipleOf"] != int(node["multipleOf"]):
            raise FormError(f"multipleOf at {path} is no whole number, which is not supported")
        if node.get("multipleOf", 0) > MAX_MULTIPLE:
            raise FormError(f"multipleOf at {path} is greater than {MAX_MULTIPLE}, which is not supported")

    # -- objects ----------------------------------------------------------------------------------------------

    def _object(self, node: dict[str, Any], written: dict[str, Any], path: str) -> None:
        declared = node.get("properties", {})
        patterns = node.get("patternProperties", {})
        required = list(dict.fromkeys(node.get("required", [])))
        others = node.get("additionalProperties", not (declared or patterns))
        if patterns and others is not False and "additionalProperties" in node:
            raise FormError(f"additionalProperties beside patternProperties at {path} is not supported unless false")
        if len(declared.keys() - set(required)) > MAX_OPTIONAL_PROPERTIES:
            raise FormError(
                f"properties at {path} has more than {MAX_OPTIONAL_PROPERTIES} that are not required, which is not "
                "supported"
            )
        if len(required) + 1 < node.get("minProperties", 0):
            # Names that are free may be written twice, which validators count once.
            raise FormError(f"minProperties at {path} is more than one above the required ones, which is not supported")
        properties = {name: self._schema(each, f"{path}/properties/{name}") for name, each in declared.items()}
        free = None if others is False else self._schema(others, f"{path}/additionalProperties")
        if free is not None and free is not False:
            for name in required:
                # Required though not declared.
                properties.setdefault(name, free)
        written_patterns = {
            f"^(?:{_canonical(pattern, f'{path}/patternProperties')})$": self._schema(
                each, f"{path}/patternProperties/{pattern}"
            )
            for pattern, each in patterns.items()
        }
        if properties:
            written["properties"] = properties
        if required:
            written["required"] = required
        if free is not None and properties and free is not False:
            written_patterns[f"^(?:{other_than(list(properties))})$"] = free
            free = False
        if written_patterns:
            written["patternProperties"] = written_patterns
        if properties or written_patterns or "additionalProperties" in node:
            written["additionalProperties"] = False if free is None else free

    # -- what a schema refers to ------------------------------------------------------------------------------

    def _name(self, pointer: str, path: str) -> str:
        if pointer not in self._names:
            self._target(pointer, path)
            self._names[pointer] = f"d{len(self._names)}"
        return self._names[pointer]

    def _target(self, pointer: str, path: str) -> Any:
        if not pointer.startswith("#"):
            raise FormError(f"$ref at {path} leads out of the schema, which is not supported")
        node = self._root
        for part in unquote(pointer[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            else:
                raise FormError(f"$ref at {path} refers to {shown(pointer)}, which does not exist")
        if pointer not in ("#", "") and not pointer.startswith("#/"):
            raise FormError(f"$ref at {path} refers to an anchor, which is not supported")
        return node

    def _count(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise FormError("the schema has too many parts once its branches are written out")

    # -- keywords ---------------------------------------------------------------------------------------------

    def _checked(self, node: Any, path: str) -> Schema:
        """The keywords that say something, all well-formed, in their newest spelling."""
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise FormError(f"the schema at {path} must be an object or a boolean")
        found = {key: value for key, value in node.items() if key in _HEEDED or key in _COMBINING}
        self._translate(node, found, path)
        for key, value in found.items():
            problem = CHECKS[key](value)
            if problem:
                raise FormError(f"{key} at {path} {problem}")
        names = node.get("propertyNames", True)
        return found if names is True or names == {} else self._named(found, names, path)

    def _translate(self, node: dict[str, Any], found: dict[str, Any], path: str) -> None:
        for key in sorted(UNSUPPORTED & node.keys()):
            if key not in _SAYS_NOTHING or node[key] != _SAYS_NOTHING[key]:
                raise FormError(f"{key} at {path} is not supported")
        if "if" in node and node.keys() & {"then", "else"}:
            raise FormError(f"if at {path} is not supported")
        if path != "#" and isinstance(node.get("$id"), str):
            raise FormError(f"$id at {path} is not supported")
        if isinstance(node.get("items"), list):
            # Before 2020 a list of schemas was called "items", and what follows it "additionalItems".
            found["prefixItems"] = node["items"]
            found["items"] = node.get("additionalItems", True)
        unevaluated = node.get("unevaluatedProperties", True)
        if unevaluated not in (True, {}):
            if node.keys() & {*_COMBINING, "additionalProperties"}:
                raise FormError(f"unevaluatedProperties at {path} is not supported beside other keywords")
            found["additionalProperties"] = unevaluated
        for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
            value = found.get(key)
            if isinstance(value, float) and value.is_integer():
                found[key] = int(value)
        if isinstance(found.get("type"), list) and len(found["type"]) == 1:
            found["type"] = found["type"][0]

    def _named(self, found: dict[str, Any], names: Any, path: str) -> Schema:
        """``propertyNames`` where it lists the names, or is a pattern for them."""
        names = self._resolved(names, path)
        if not isinstance(names, dict) or found.keys() & {"properties", "patternProperties", *_COMBINING}:
            raise FormError(f"propertyNames at {path} is not supported beside other keywords")
        says = names.keys() & (_HEEDED | set(_COMBINING) | UNSUPPORTED | {"propertyNames"}) - {"type"}
        each = found.pop("additionalProperties", True)
        found["additionalProperties"] = False
        listed = [names["const"]] if "const" in names else names.get("enum")
        if says in ({"enum"}, {"const"}) and isinstance(listed, list):
            found["properties"] = {name: each for name in listed if isinstance(name, str)}
        elif says == {"pattern"} and isinstance(names["pattern"], str):
            found["patternProperties"] = {names["pattern"]: each}
        else:
            raise FormError(f"propertyNames at {path} is supported with enum, const or pattern alone")
        return found


def _canonical(pattern: str, path: str) -> str:
    try:
        return canonical(pattern, search=True)
    except FormError as error:
        raise FormError(f"pattern at {path}: {error}") from None

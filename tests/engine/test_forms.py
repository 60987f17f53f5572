"""Forms: either refused with a reason, or no answer that breaks them.

Every schema that is taken is walked at random through its masks, byte by byte, and a JSON Schema validator judges what
comes out. Beside that each has texts that the grammar must and must not take.
"""

from __future__ import annotations

import json
import random
import re
from datetime import datetime, time
from typing import Any

import jsonschema
import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.grammar.errors import FormError
from engine.grammar.formats import FORMATS
from engine.grammar.forms import grammar_of
from engine.grammar.worker import Setup, examine, parser_limits
from engine.types import StructuredOutputs

BYTES = LLTokenizer("byte")
SETUP = Setup("byte", BYTES.vocab_size, BYTES.eos_token, any_whitespace=True, seconds=2, memory=1 << 30)
LIKED = dict.fromkeys('"}],:', 20)
HURRIED = {'"': 1000, **dict.fromkeys("}]abc0123456789", 100)}


def matcher_of(form: StructuredOutputs) -> LLMatcher:
    verdict = examine(form, SETUP, BYTES, parser_limits())
    assert verdict.problem is None, verdict.problem
    assert verdict.grammar is not None
    return LLMatcher(BYTES, verdict.grammar, log_level=0, limits=parser_limits())


def problem_of(form: StructuredOutputs) -> str:
    problem = examine(form, SETUP, BYTES, parser_limits()).problem
    assert problem is not None
    return problem


def takes(matcher: LLMatcher, text: str) -> bool:
    content = list(text.encode())
    each = matcher.deep_copy()
    return each.try_consume_tokens(content) == len(content) and each.is_accepting()


def walk(matcher: LLMatcher, draw: random.Random, length: int = 300) -> bytes | None:
    """A text that the masks allow, or None if it does not end in time."""
    matcher = matcher.deep_copy()
    text = bytearray()
    while len(text) < length:
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        assert allowed, "a mask is empty"
        assert not matcher.is_error(), matcher.get_error()
        hurry = len(text) > length // 3
        if BYTES.eos_token in allowed and (hurry or len(allowed) == 1 or draw.random() < 0.3):
            return bytes(text)
        allowed = [token for token in allowed if token < 256]
        weights = [(HURRIED if hurry else LIKED).get(chr(byte), 1) for byte in allowed]
        token = draw.choices(allowed, weights)[0]
        assert matcher.consume_token(token)
        text.append(token)
    return None


INTEGERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPEN = {**INTEGERS, "additionalProperties": {"type": "string"}}
TAGGED = [
    {"type": "object", "properties": {"k": {"const": name}, name: {"type": "integer"}}, "required": ["k"]}
    for name in ("cat", "dog")
]

FOLLOWED: list[tuple[str, Any, list[str], list[str]]] = [
    ("type", {"type": ["integer", "null"]}, ["3", "null"], ["3.5", '"3"', "true"]),
    ("enum", {"enum": ["a", 3, {"b": [1]}], "type": ["string", "object"]}, ['"a"', '{"b":[1]}'], ["3", '"b"']),
    ("enum beside bounds", {"enum": ["a", "abc"], "maxLength": 2}, ['"a"'], ['"abc"']),
    ("const", {"const": "é"}, ['"é"'], ['"e"']),
    ("minimum", {"type": "integer", "minimum": 5}, ["5", "17"], ["4", "-6"]),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 1.5}, ["1.6", "2"], ["1.5", "1.50000000000000000001"]),
    ("exclusive, integer", {"type": "integer", "exclusiveMaximum": 2.5}, ["2"], ["3"]),
    ("multipleOf", {"type": "integer", "multipleOf": 3}, ["9"], ["4"]),
    ("lengths", {"type": "string", "minLength": 1, "maxLength": 2}, ['"\\n"', '"é\\t"'], ['"\t"', '""', '"\x01"', '"abc"']),  # noqa: E501
    ("pattern", {"type": "string", "pattern": "^a|b$"}, ['"ac"', '"cb"'], ['"ca"']),
    ("pattern in a group", {"type": "string", "pattern": "(^a|b$)"}, ['"ac"', '"cb"'], ['"ca"']),
    ("pattern, caret", {"type": "string", "pattern": r"^[\^0-9]$"}, ['"^"', '"3"'], ['"a"']),
    ("pattern, digits", {"type": "string", "pattern": r"^\d\D$"}, ['"3a"'], ['"٣a"', '"3٣"']),
    ("pattern and lengths", {"type": "string", "pattern": "^a+$", "maxLength": 3}, ['"aa"'], ['"aaaa"']),
    ("format", {"type": "string", "format": "date"}, ['"1999-01-31"'], ['"1999-02-31"']),
    ("items", {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, ["[1]"], ["[]", "[1,2,3]", '["a"]']),  # noqa: E501
    ("prefixItems", {"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, ["[1]"], ["[1,2]", '["a"]']),  # noqa: E501
    ("items of old", {"type": "array", "items": [{"type": "integer"}], "additionalItems": False}, ["[1]"], ["[1,2]"]),
    ("properties", INTEGERS, ['{"a":1}', "{}"], ['{"a":"x"}', '{"a":1,"a":"x"}', '{"\\u0061":"x"}', '{"b":1}']),
    ("additionalProperties", OPEN, ['{"a":1,"b":"x"}'], ['{"a":1,"\\u0061":"x"}', '{"b":1}', '{"a":1,"a":"x"}']),
    ("patternProperties", {"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, ['{"xa":1}'], ['{"xa":"s"}', '{"\\u0078a":"s"}']),  # noqa: E501
    ("propertyNames", {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "integer"}}, ['{"a":1}'], ['{"b":1}']),  # noqa: E501
    ("required, undeclared", {"type": "object", "required": ["z"]}, ['{"z":1}'], ['{"a":1}', "{}"]),
    ("required, undeclared, beside others", {**OPEN, "required": ["z"]}, ['{"a":1,"z":"x"}', '{"z":"x","b":"y"}'], ['{"a":1}', '{"z":1}', '{"b":"y"}']),  # noqa: E501
    ("minProperties", {"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
    ("keywords beside anyOf", {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, ['{"a":1}'], ["3", "{}", '{"c":1}']),  # noqa: E501
    ("keywords beside allOf", {**INTEGERS, "allOf": [{"required": ["b"], "properties": {"b": {"type": "null"}}}]}, ['{"a":1,"b":null}'], ['{"a":1}', '{"b":1}']),  # noqa: E501
    ("keywords beside $ref", {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 3}, ["3"], ["2", '"x"']),  # noqa: E501
    ("allOf", {"allOf": [{"type": "string"}, {"enum": ["yes", 4]}]}, ['"yes"'], ["4", '"maybe"']),
    ("oneOf by a constant", {"oneOf": TAGGED}, ['{"k":"dog","dog":1}'], ['{"k":"dog","cat":1}', '{"k":"cow"}']),
    ("oneOf by $ref", {"oneOf": [{"$ref": "#/$defs/0"}, {"$ref": "#/$defs/1"}], "$defs": dict(zip("01", TAGGED, strict=True))}, ['{"k":"cat"}'], ["3"]),  # noqa: E501
    ("recursion", {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]}, ['{"next":{"next":null}}'], ["{}"]),  # noqa: E501
    ("says nothing", {"uniqueItems": False, "not": False, "dependentRequired": {}, "title": "t", "type": "null"}, ["null"], ["1"]),  # noqa: E501
    ("anything", {}, ["[1]", "null"], ["nul"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), [case[1:] for case in FOLLOWED], ids=[case[0] for case in FOLLOWED])
def test_a_schema_is_followed(schema: Any, good: list[str], bad: list[str]) -> None:
    draft = jsonschema.Draft7Validator if "additionalItems" in schema else jsonschema.Draft202012Validator
    validator = draft(schema)
    matcher = matcher_of(StructuredOutputs(json=json.dumps(schema)))
    for text in good:
        assert takes(matcher, text), text
    for text in bad:
        assert not takes(matcher, text), text
    draw = random.Random(5)
    texts = [walk(matcher, draw) for _ in range(30)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 15
    for text in ended:
        validator.validate(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        *(
            ({"type": "object", "properties": {"p": {keyword: value}}}, f"{keyword} at #/properties/p is not supported")
            for keyword, value in [
                ("not", {"type": "null"}),
                ("dependentRequired", {"a": ["b"]}),
                ("dependentSchemas", {"a": {}}),
                ("dependencies", {"a": ["b"]}),
                ("contains", True),
                ("uniqueItems", True),
                ("unevaluatedItems", False),
                ("$dynamicRef", "#a"),
            ]
        ),
        ({"if": {"type": "null"}, "then": False}, "if at # is not supported"),
        ({"anyOf": []}, "anyOf at # must be a list of at least one schema"),
        ({"$ref": "#"}, "no finite answer"),
        ({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}, "no finite answer"),
        ({"$ref": "other.json"}, "leads out of the schema"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "may overlap"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf at # is no whole number"),
        ({"type": "object", "minProperties": 3}, "minProperties at #"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern at #: the regular expression has a look-ahead"),
        ({"type": "string", "pattern": "("}, "pattern at #: the regular expression cannot be read"),
        ({"type": "strin"}, "type at # must be one or more of"),
        ({"properties": []}, "properties at # must be"),
        ({"minLength": -1}, "minLength at # must be"),
        (
            {"not": False, "properties": {f"{number}": {} for number in range(1001)}},
            "properties at # has more than 1000 that are not required",
        ),
        ({"minLength": 10**40}, "minLength at # must be"),
        ({"const": {"id": [2**53 + 1]}}, "const at # has a number beyond 2**53"),
        ({"properties": {"a": {"enum": [1, 1e30]}}}, "enum at #/properties/a has a number beyond 2**53"),
        ({"type": "integer", "multipleOf": 10**20}, "multipleOf at # is greater than"),
        (
            {"properties": {"a": {"type": "string", "pattern": "^(a|b)*a(a|b){20}$", "minLength": 30}}},
            "the pattern, format or lengths at #/properties/a are too complex together",
        ),
        (
            {"anyOf": [{"type": "null"}, {"type": "string", "format": "email", "minLength": 300}]},
            "the pattern, format or lengths at # are too complex together",
        ),
        ({"type": "string", "pattern": "\\ud83d"}, "pattern at #: the regular expression has half of a surrogate pair"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "nothing satisfies"),
        (False, "no finite answer"),
        ([], "must be an object or a boolean"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_by_name(schema: Any, says: str) -> None:
    problem = problem_of(StructuredOutputs(json=json.dumps(schema)))
    assert says in problem
    assert "\n" not in problem


@pytest.mark.parametrize("optional", [600, 1000])
def test_objects_of_many_properties_are_followed(optional: int) -> None:
    names = [f"p{number}" for number in range(optional + 10)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "null"} for name in names},
        "required": names[optional:],
    }
    matcher = matcher_of(StructuredOutputs(json=json.dumps(schema)))
    few = json.dumps(dict.fromkeys([names[0], *names[optional - 1 :]]))
    assert takes(matcher, few)
    assert not takes(matcher, few.replace("null", "1", 1))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date-time", ["2024-02-29T23:59:59.123456+02:00", "0001-01-01T00:00:00Z"], ["2024-01-01T00:00:60Z"]),
        ("time", ["00:00:00Z", "23:59:59.5-23:59"], ["23:59:60Z", "00:00:00.1234567Z", "24:00:00Z", "00:00:00"]),
        ("date", ["2000-02-29", "1999-12-31", "0004-02-29"], ["1900-02-29", "2023-02-29", "2023-04-31", "0000-01-01"]),
        ("duration", ["P1Y2M3DT4H5M6S", "PT5M", "P3W", "P0D"], ["P", "PT", "P1S", "P1Y1W"]),
        ("email", ["o'hara+x@mail.example.org", "a.b@c.de"], ["a@b", "a..b@c.de", ".a@b.cd", "a@b.cd."]),
        ("hostname", ["www.example.org", "a-b.c1.de"], ["-a.de", "a-.de", "1.2.3.4", "a..de"]),
        ("ipv4", ["0.0.0.0", "255.249.199.10"], ["256.0.0.1", "01.2.3.4", "1.2.3"]),
        ("ipv6", ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "fe80::a:b"], ["1:2:3:4:5:6:7", "1::2::3", ":1"]),
        ("uuid", ["123e4567-E89B-12d3-a456-426614174000"], ["0" * 32]),
        ("uri", ["https://a.example.org:80/b//c?d=/e#f", "mailto:a@b.cd", "urn:x:%20"], ["//a.bc", "a b:c", "x:%2"]),
    ],
)
def test_a_format_is_what_all_validators_take(name: str, good: list[str], bad: list[str]) -> None:
    schema = {"type": "string", "format": name}
    matcher = matcher_of(StructuredOutputs(json=json.dumps(schema)))
    validators = [
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER),
        jsonschema_rs.Draft202012Validator(schema, validate_formats=True),
    ]
    draw = random.Random(3)
    walks = [walk(matcher, draw) for _ in range(60)]
    texts = [str(json.loads(text)) for text in walks if text is not None]
    assert len(set(texts)) > 20
    for text in [*good, *texts]:
        assert takes(matcher, json.dumps(text)), text
        for validator in validators:
            assert validator.is_valid(text), (validator, text)
        if name in ("date", "date-time"):
            datetime.fromisoformat(text)
        elif name == "time":
            time.fromisoformat(text)
    for text in bad:
        assert not takes(matcher, json.dumps(text)), text


def test_every_format_that_is_followed_is_tried() -> None:
    (marks,) = (mark for mark in test_a_format_is_what_all_validators_take.pytestmark if mark.name == "parametrize")
    assert {case[0] for case in marks.args[1]} == set(FORMATS)


def test_options_of_the_back_end_in_a_schema_are_not_heeded() -> None:
    schema = {"x-guidance": {"lenient": True, "whitespace_pattern": "x"}, "type": "array", "items": {"type": "null"}}
    assert not takes(matcher_of(StructuredOutputs(json=json.dumps(schema))), "[xnull]")


@pytest.mark.filterwarnings("ignore:Possible set intersection:FutureWarning")
@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"[\^0-9]", ["^", "7"], ["a"]),
        (r"\Aab\Z", ["ab"], ["AabZ"]),
        (r"^ab$", ["ab"], ["ab\n"]),
        (r"[a&&b]", ["a", "&"], ["", "c"]),
        (r"[]a]{2}", ["]a"], ["a"]),
        (r"(?i)k[^k]", ["Ka"], ["kK", "k\u212a"]),
        (r"(?:a|b){2,}?", ["abb"], ["a"]),
        (r".", ["é"], ["\n"]),
        (r"", [""], ["a"]),
    ],
)
def test_a_regular_expression_means_what_python_means(pattern: str, good: list[str], bad: list[str]) -> None:
    matcher = matcher_of(StructuredOutputs(regex=pattern))
    for text in good:
        assert re.fullmatch(pattern, text)
        assert takes(matcher, text), text
    for text in bad:
        assert not takes(matcher, text), text
    draw = random.Random(1)
    for text in filter(None, (walk(matcher, draw) for _ in range(20))):
        assert re.fullmatch(pattern, text.decode())


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (StructuredOutputs(regex=r"a(?!b)"), "look-ahead"),
        (StructuredOutputs(regex=r"(a)\1"), "a reference to a group"),
        (StructuredOutputs(regex=r"a\b"), "a word boundary"),
        (StructuredOutputs(regex=r"a^b"), "an anchor other than at its beginning or end"),
        (StructuredOutputs(regex="("), "cannot be read"),
        (StructuredOutputs(regex="a\\ud83d"), "half of a surrogate pair"),
        (StructuredOutputs(regex="[\\ud83d]"), "half of a surrogate pair"),
        (StructuredOutputs(json='{"const": "\\ud83d"}'), "half of a surrogate pair in a text"),
        (StructuredOutputs(json='{"const": 1e400}'), "the number '1e400', which is too large"),
        (StructuredOutputs(json=f'{{"minimum": {"9" * 5000}}}'), "which is too large"),
        (StructuredOutputs(grammar="start: /(/"), 'line 1, column 8: invalid regex "(": unclosed group'),
        (StructuredOutputs(grammar="start: foo"), 'line 1, column 8: unknown name: "foo"'),
        (StructuredOutputs(regex="[^\\x{0}-\\x{10ffff}]"), "cannot be read"),
        (StructuredOutputs(grammar="root ::= root"), "rule 'root' has no finite text"),
        (StructuredOutputs(grammar='root ::= "a" root'), "rule 'root' has no finite text"),
        (StructuredOutputs(grammar="root ::= nothing"), "rule 'nothing', which does not exist"),
        (StructuredOutputs(grammar='other ::= "a"'), "no rule 'root'"),
        (StructuredOutputs(grammar='root ::= "a" ('), "line 1"),
        (StructuredOutputs(grammar="start: start"), "nothing satisfies"),
        (StructuredOutputs(grammar='start: %json {"type": "array", "uniqueItems": true}'), "%json"),
        (StructuredOutputs(choice=()), "at least one"),
        (StructuredOutputs(choice=("x" * 40_000, "y" * 40_000)), "more than 65536 characters in all"),
        (StructuredOutputs(json="{"), "no JSON"),
        (StructuredOutputs(json='{"minimum": NaN}'), "NaN"),
        (StructuredOutputs(json="[" * 5000), "nested too deeply"),
        (StructuredOutputs(json="{}", regex="a"), "exactly one"),
        (StructuredOutputs(), "exactly one"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(form: StructuredOutputs, says: str) -> None:
    problem = problem_of(form)
    assert says in problem
    assert "\n" not in problem


def test_what_nobody_has_put_in_plain_words_goes_to_the_log_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "(And (SearchRegex /^x$/)\n internals"

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError(said)

    monkeypatch.setattr("engine.grammar.worker.grammar_of", refuse)
    assert problem_of(StructuredOutputs(regex="a")) == "the form cannot be compiled"
    assert "SearchRegex" in capfd.readouterr().err
    said = "parser error: Too many items (limit 50000; mask)"
    assert problem_of(StructuredOutputs(regex="a")) == "the form is too large for the back end"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "x" [0-9] | "y" root', ["x3", "yyx0"], ["y", "x"]),
        ('root ::= "(" root ")" | ""', ["(())", ""], ["(()"]),
        ('root ::= (("a"? "b"?){1,100}){1,100}', ["abba", ""], ["c"]),
        ('root ::= a b # and\na ::= [^\\n"\\]-]+\nb ::= "\\u00e9\\x41"\n | ";"', ["x\u00e9A", "xy;"], ["x", "-;"]),
        ('start: "a" | "b" start', ["bba"], ["b"]),
    ],
)
def test_a_grammar_is_followed(grammar: str, good: list[str], bad: list[str]) -> None:
    matcher = matcher_of(StructuredOutputs(grammar=grammar))
    assert [text for text in good if not takes(matcher, text)] == []
    assert [text for text in bad if takes(matcher, text)] == []


def test_a_choice_is_exactly_one_of_its_texts() -> None:
    matcher = matcher_of(StructuredOutputs(choice=("ab", "abc", "a.c", 'q"')))
    assert [text for text in ("ab", "abc", "a.c", 'q"') if not takes(matcher, text)] == []
    assert [text for text in ("a", "axc", "abcd", "") if takes(matcher, text)] == []


def test_no_form_at_all_is_an_error() -> None:
    with pytest.raises(FormError, match="exactly one"):
        grammar_of(StructuredOutputs())

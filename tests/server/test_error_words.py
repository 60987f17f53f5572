"""What is said of a field, whatever is wrong with it: plain words about JSON, never the validation library's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from server.errors import from_validation
from server.protocol.base import Strict
from server.protocol.chat import ChatRequest, Message
from server.protocol.common import CollaborationOptions, StreamOptions
from server.protocol.completions import CompletionRequest
from server.protocol.structured import JsonSchema, ResponseFormat, StructuredOutputsOptions
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest

VALUES: list[Any] = [
    *(None, True, "", "x", 5, -5, 1.5, 10**18, 10**30, 1e30, [], [1], [-1], [True], [""], [None], [[]], [{}], {}),
    *({"a": 1}, {"a": "x"}, {"role": "x"}, {"x" * 100: "y"}, {str(number): "y" for number in range(5000)}),
    *("x" * 70_000, ["x"] * 5000, [{"role": "user", "content": 5}], [{"type": "text", "text": 5}]),
]
GOOD: dict[type[Strict], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True},
    CompletionRequest: {"model": "m", "prompt": "x", "stream": True},
    TokenizeRequest: {"prompt": "x"},
    DetokenizeRequest: {"tokens": [1]},
}
LIBRARY = re.compile(r"should|valid|items|Input|List|Dictionary|String|True|False|None|dict|\bint\b|float")


def fields_of(model: type[Strict]) -> Iterator[tuple[str, Any]]:
    """Every field with every value."""
    for name, field in model.model_fields.items():
        for value in VALUES:
            yield field.alias or name, value


def bodies(model: type[Strict]) -> Iterator[dict[str, Any]]:
    good = GOOD[model]
    for name, value in fields_of(model):
        yield good | {name: value}
    if model is ChatRequest:
        for name, value in fields_of(Message):
            yield good | {"messages": [{"role": "user", "content": "x", name: value}]}
    if model in (ChatRequest, CompletionRequest):
        for outer, inner, rest in (
            ("collaboration", CollaborationOptions, {}),
            ("stream_options", StreamOptions, {}),
            ("structured_outputs", StructuredOutputsOptions, {}),
            ("response_format", ResponseFormat, {"type": "json_schema"}),
        ):
            for name, value in fields_of(inner):
                yield good | {outer: rest | {name: value}}
        for name, value in fields_of(JsonSchema):
            yield good | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", name: value}}}


@pytest.mark.parametrize("model", GOOD, ids=lambda model: model.__name__)
def test_no_word_of_the_library(model: type[Strict]) -> None:
    kinds = set()
    for body in bodies(model):
        try:
            model.model_validate_json(json.dumps(body))
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            found = from_validation(problems, model.messages_by_field)
            kinds.add(problems[0]["type"])
            assert found.status == 400
            assert found.param
            assert found.code
            said = found.message.replace(found.param, "")
            assert not LIBRARY.search(said), found.message
            assert len(found.message) < 300
    assert len(kinds) >= 3, kinds


@pytest.mark.parametrize(
    ("collaboration", "says"),
    [
        ({"weights": "gate"}, "'collaboration.weights' must be an object."),
        ({"weights": {"base": -1}}, "'collaboration.weights.base' must be at least 0."),
        (
            {"blend": {"kind": "mixture", "weights": {"base": "x"}}},
            "'collaboration.blend.weights' must be 'gate', or map members to numbers from -10 to 10.",
        ),
    ],
)
def test_fields_of_one_name_are_told_apart(collaboration: dict[str, Any], says: str) -> None:
    body = GOOD[CompletionRequest] | {"collaboration": collaboration}
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate_json(json.dumps(body))
    problems = refused.value.errors(include_url=False, include_input=False)
    assert from_validation(problems, CompletionRequest.messages_by_field).message == says

"""Structured output: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import Field, model_validator

from engine.types import StructuredOutputs
from server.errors import FieldError
from server.protocol.base import Strict, Unsupported

MAX_GRAMMAR_LENGTH = 64 * 1024
"""Characters of a form in all (a schema, a regular expression, choices, a grammar): compiling them takes time."""

MAX_CHOICES = 1024

Text = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_LENGTH)]
Schema = dict[str, Any] | bool
"""``true`` is any value, ``false`` none."""


class JsonSchema(Strict):
    """A named JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    """For the client's own books."""

    schema_: Schema | None = Field(default=None, alias="schema")
    """The schema. Default: any JSON object."""

    description: Annotated[str, Field(max_length=MAX_GRAMMAR_LENGTH)] | None = None
    """For the client's own books."""

    strict: bool | None = None
    """Taken and not heeded: the schema is always followed strictly."""


class ResponseFormat(Strict):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    """"text" asks for nothing."""

    json_schema: JsonSchema | None = None
    """With "json_schema"."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("response_format.json_schema", "must be given with type 'json_schema', and only then")
        return self

    @property
    def schema_(self) -> Schema | None:
        """The schema, if there is one; else an answer of type "json_schema" is any JSON object."""
        return None if self.json_schema is None else self.json_schema.schema_


class StructuredOutputsOptions(Strict):
    """A grammar for the whole answer, whoever writes it; exactly one field. Names are vLLM's."""

    json_: Schema | Text | None = Field(default=None, alias="json")
    """A JSON schema, as an object or as text."""

    json_object: Literal[True] | None = None
    """Any JSON object."""

    regex: Text | None = None
    """A regular expression that the whole answer matches."""

    choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    """One of these texts."""

    grammar: Text | None = None
    """An EBNF grammar."""

    structural_tag: Unsupported = None
    whitespace_pattern: Unsupported = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self._given) != 1:
            raise FieldError("structured_outputs", "must have exactly one of json, json_object, regex, choice, grammar")
        return self

    @property
    def given(self) -> str:
        """The name of the field that is given."""
        return self._given[0]

    @property
    def _given(self) -> list[str]:
        forms = {
            "json": self.json_,
            "json_object": self.json_object,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        return [name for name, value in forms.items() if value is not None]


def engine_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputsOptions | None
) -> StructuredOutputs | None:
    """The grammar as the engine takes it; at most one of the arguments is given.

    Raises:
        FieldError: a schema that is too long.
    """
    if structured_outputs is not None:
        options = structured_outputs
        if sum(map(len, options.choice or ())) > MAX_GRAMMAR_LENGTH:
            raise FieldError(
                "structured_outputs.choice", f"must not have more than {MAX_GRAMMAR_LENGTH} characters in all"
            )
        schema = options.json_
        return StructuredOutputs(
            json=schema if isinstance(schema, str) else _text(schema, "structured_outputs.json"),
            json_object=bool(options.json_object),
            regex=options.regex,
            choice=tuple(options.choice) if options.choice is not None else None,
            grammar=options.grammar,
        )
    if response_format is None or response_format.type == "text":
        return None
    schema = response_format.schema_
    if schema is None:
        return StructuredOutputs(json_object=True)
    return StructuredOutputs(json=_text(schema, "response_format.json_schema.schema"))


def _text(schema: Schema | None, param: str) -> str | None:
    if schema is None:
        return None
    text = msgspec.json.encode(schema).decode()
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise FieldError(param, f"must not be longer than {MAX_GRAMMAR_LENGTH} characters")
    return text

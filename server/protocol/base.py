"""The base of all request models.

Requests are parsed strictly: ``true`` is no number, ``"16"`` is no integer, NaN is refused, an unknown field is an
error that names it. As in OpenAI's API null means "not given".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from server.errors import UNSUPPORTED_VALUE

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
ModelName = Annotated[str, Field(max_length=16 * 1024)]
Unsupported = Annotated[None, Field(description="Not supported; anything but null answers 400.")]


# Compared by identity: to typing's cache of Annotated, Only((0,)) and Only((False,)) would be the same.
@dataclass(frozen=True, slots=True, eq=False)
class Only:
    """Marks a field that is accepted only with values that ask for nothing: null, or one of ``allowed``.

    Client libraries send such fields by default. Any other value would change the answer and is refused by name.
    """

    allowed: tuple[Any, ...]

    def check(self, value: object) -> object:
        """The value, if it asks for nothing; ``true`` is not 1 here, nor ``false`` 0."""
        if value is None or any(type(value) is type(other) and value == other for other in self.allowed):
            return value
        shown = " or ".join(json.dumps(value) for value in self.allowed if type(value) is not float)
        raise PydanticCustomError(
            UNSUPPORTED_VALUE, "is not supported by this server; it may only be {allowed}", {"allowed": shown}
        )

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, _schema: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": [None, *self.allowed], "description": "Accepted with these values only, which ask for nothing."}


class Strict(BaseModel):
    """Base of all request models."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    messages_by_field: ClassVar[dict[str, str]] = {}
    """What to say of a field of which several shapes are allowed, when none fits."""

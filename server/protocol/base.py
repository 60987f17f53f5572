"""The base of all request models.

Requests are parsed strictly: ``true`` is no number, ``"16"`` is no integer, NaN is refused, an unknown field is an
error that names it. As in OpenAI's API null means "not given".
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0)]
Unsupported = Annotated[None, Field(description="Not supported; anything but null answers 400.")]


class Strict(BaseModel):
    """Base of all request models."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    messages_by_field: ClassVar[dict[str, str]] = {}
    """What to say of a field of which several shapes are allowed, when none fits."""

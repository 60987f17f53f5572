"""POST /tokenize and /detokenize: what may be asked. vLLM's names."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from server.protocol.base import ModelName, Strict, TokenId

MAX_TEXT_LENGTH = 2**20
"""Characters of a text; longer than any context of today, and still a matter of a second."""

MAX_TOKENS = 2**18


class TokenizeRequest(Strict):
    """Text to token ids."""

    messages_by_field: ClassVar[dict[str, str]] = {
        "prompt": f"must be a string of at most {MAX_TEXT_LENGTH} characters"
    }

    prompt: Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
    """The text; may be empty."""

    model: ModelName | None = None
    """Whose tokens; matters only where members have vocabularies of their own. Default: the base's."""

    add_special_tokens: bool | None = None
    """As a prompt of /v1/completions would get them. Default: true."""

    return_token_strs: bool | None = None
    """Return the tokens' texts too. Default: false."""


class DetokenizeRequest(Strict):
    """Token ids to text."""

    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
    """The token ids; may be empty."""

    model: ModelName | None = None
    """Whose tokens; matters only where members have vocabularies of their own. Default: the base's."""

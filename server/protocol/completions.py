"""POST /v1/completions: what may be asked."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from server.errors import FieldError
from server.protocol.base import Only, TokenId, Unsupported
from server.protocol.common import MAX_LOGPROBS, GenerationFields

MAX_PROMPTS = 1024
MAX_BEST_OF = 20
DEFAULT_MAX_TOKENS = 16

NonEmpty = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[
    NonEmpty
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)],
    Field(union_mode="left_to_right"),
]


class CompletionRequest(GenerationFields):
    """Continue one or more prompts."""

    messages_by_field: ClassVar[dict[str, str]] = GenerationFields.messages_by_field | {
        "prompt": (
            "must be a non-empty string, an array of non-empty strings, an array of token ids, or an array of "
            f"non-empty arrays of token ids; at most {MAX_PROMPTS} prompts"
        )
    }

    prompt: Prompt
    """Text or token ids, one prompt or up to 1024."""

    max_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """Most tokens to write. 0 only with ``echo``. Default: 16."""

    best_of: int | None = Field(default=None, ge=1, le=MAX_BEST_OF)
    """Write so many, return the ``n`` with the highest mean logprob. Not with ``stream``."""

    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Return the logprobs of the written tokens and of so many of the most probable ones."""

    echo: bool | None = None
    """Return the prompt before the text; with ``logprobs``, its logprobs too. Default: false."""

    suffix: Annotated[Any, Only(("",))] = None
    prompt_embeds: Unsupported = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "may only be 0 with echo")
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise FieldError("best_of", "must not be less than n")
            if self.best_of > 1 and self.stream:
                raise FieldError("best_of", "cannot be used with stream")
        if self.max_tokens is None:
            limit, default = DEFAULT_MAX_TOKENS, f", which is {DEFAULT_MAX_TOKENS} by default"
        else:
            limit, default = self.max_tokens, ""
        if (self.min_tokens or 0) > limit:
            raise FieldError("min_tokens", f"must not be greater than max_tokens{default}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, whatever form they came in."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt

    @property
    def candidates(self) -> int:
        """Choices to be written for each prompt; the best n are returned."""
        return self.best_of or self.n or 1

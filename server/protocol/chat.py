"""POST /v1/chat/completions: what may be asked."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from server.errors import FieldError
from server.protocol.base import Strict, Unsupported
from server.protocol.common import GenerationFields

MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 4096


class TextPart(Strict):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message so far."""

    role: Literal["system", "developer", "user", "assistant"]
    """Whether a role is known, and where it may stand, is for the chat template to say."""

    content: str | Annotated[list[TextPart], Field(min_length=1)]
    """Text, or parts that are all text."""

    name: str | None = None
    """Passed to the chat template."""

    # What OpenAI's SDK puts into an answer's message, so that it can be sent back as it came.
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class ChatRequest(GenerationFields):
    """Answer a conversation."""

    messages_by_field: ClassVar[dict[str, str]] = GenerationFields.messages_by_field | {
        "content": "must be a string or a non-empty array of parts of type 'text'"
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation so far."""

    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """Most tokens to write. Default: what the context has room for."""

    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """Older name of max_completion_tokens."""

    logprobs: bool | None = None
    """Return the logprobs of the written tokens. Default: false."""

    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """With ``logprobs``, return those of so many of the most probable tokens too. Default: 0."""

    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    modalities: Unsupported = None
    moderation: Unsupported = None
    parallel_tool_calls: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    tool_choice: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "and max_completion_tokens are both given and differ")
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "may only be given with logprobs")
        limit = self.limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise FieldError("min_tokens", f"must not be greater than {self.limit_name}")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens to write; None is what the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """The field that the limit came in."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

"""POST /v1/chat/completions: what may be asked."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from server.errors import FieldError
from server.protocol.base import Only, Strict, Unsupported
from server.protocol.common import MAX_LOGPROBS, GenerationFields

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_DOCUMENTS = 256
MAX_TEMPLATE_VARIABLES = 64
MAX_DOCUMENT_LENGTH = 2**20

Document = Annotated[
    dict[str, Annotated[str, Field(max_length=MAX_DOCUMENT_LENGTH)]], Field(max_length=MAX_TEMPLATE_VARIABLES)
]


class TextPart(Strict):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message so far."""

    role: Literal["system", "developer", "user", "assistant"]
    """Whether a role is known, and where it may stand, is for the chat template to say."""

    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    """Text, or parts that are all text. Only an assistant's may be null, which is no text."""

    name: Annotated[str, Field(max_length=1024)] | None = None
    """Passed to the chat template."""

    # What responses of OpenAI, vLLM and client libraries have, so that they can be sent back as they came.
    tool_calls: Annotated[Any, Only(([],))] = None
    annotations: Annotated[Any, Only(([],))] = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    reasoning: Annotated[Any, Only(("",))] = None
    reasoning_content: Annotated[Any, Only(("",))] = None
    provider_specific_fields: Annotated[Any, Only(({},))] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise FieldError("content", "must be a string or a non-empty array of parts of type 'text'")
        return self

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
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

    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """With ``logprobs``, return those of so many of the most probable tokens too. Default: 0."""

    add_generation_prompt: bool | None = None
    """Begin an assistant's message after the conversation. Default: true, or false with ``continue_final_message``."""

    continue_final_message: bool | None = None
    """Go on with the last message instead of answering it. Default: false."""

    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None = None
    """Further variables for the chat template, e.g. ``enable_thinking``."""

    documents: Annotated[list[Document], Field(max_length=MAX_DOCUMENTS)] | None = None
    """Passed to the chat template."""

    # First of those that are refused: where there are tools, the others only belong to them.
    tools: Annotated[Any, Only(([],))] = None
    functions: Annotated[Any, Only(([],))] = None
    tool_choice: Annotated[Any, Only(("none", "auto"))] = None
    function_call: Annotated[Any, Only(("none", "auto"))] = None
    parallel_tool_calls: Annotated[Any, Only((False, True))] = None
    audio: Unsupported = None
    modalities: Annotated[Any, Only((["text"],))] = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Annotated[Any, Only(({},))] = None
    prompt_cache_retention: Annotated[Any, Only(("in_memory", "in-memory"))] = None
    reasoning_effort: Annotated[Any, Only(("none",))] = None
    verbosity: Annotated[Any, Only(("medium",))] = None
    web_search_options: Unsupported = None

    # vLLM's fields that clients send by default.
    chat_template: Unsupported = None
    echo: Annotated[Any, Only((False,))] = None
    include_reasoning: Annotated[Any, Only((False, True))] = None
    media_io_kwargs: Annotated[Any, Only(({},))] = None
    mm_processor_kwargs: Annotated[Any, Only(({},))] = None
    return_prompt_text: Annotated[Any, Only((False,))] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "and max_completion_tokens are both given and differ")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "may only be given with logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError("add_generation_prompt", "cannot be true together with continue_final_message")
        limit = self.limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise FieldError("min_tokens", f"must not be greater than {self.limit_name}")
        return self

    @property
    def adds_generation_prompt(self) -> bool:
        """Whether an assistant's message is begun after the conversation."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def limit(self) -> int | None:
        """Most tokens to write; None is what the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """The field that the limit came in."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

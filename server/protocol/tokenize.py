"""POST /tokenize and /detokenize: what may be asked. vLLM's names."""

from __future__ import annotations

from server.protocol.base import Strict, TokenId


class TokenizeRequest(Strict):
    """Text to token ids."""

    prompt: str
    """The text; may be empty."""

    model: str | None = None
    """All models share one tokenizer; a name must be a served one all the same."""

    add_special_tokens: bool | None = None
    """As a prompt of /v1/completions would get them. Default: true."""

    return_token_strs: bool | None = None
    """Return the tokens' texts too. Default: false."""


class DetokenizeRequest(Strict):
    """Token ids to text."""

    tokens: list[TokenId]
    """The token ids; may be empty."""

    model: str | None = None
    """All models share one tokenizer; a name must be a served one all the same."""

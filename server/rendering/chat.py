"""Responses and chunks of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from server.choice import Choice
from server.protocol.chat import ChatRequest
from server.protocol.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    TopLogprob,
    Usage,
)
from server.rendering.common import Head, TokenNames, asked_of, finite, most_probable, prompt_logprobs, report
from server.text.pieces import Piece
from server.text.tokenizer import TextTokenizer


class ChatRenderer:
    """Renders one request.

    Args:
        prompt_ids: token ids of the rendered conversation.
        check_below: see :func:`~server.rendering.common.report`.
    """

    def __init__(
        self,
        body: ChatRequest,
        tokenizer: TextTokenizer,
        lane_names: Sequence[str],
        *,
        head: Head,
        prompt_ids: list[int],
        check_below: float,
    ) -> None:
        self._check_below = check_below
        self._body = body
        self._tokenizer = tokenizer
        self._shown = TokenNames(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._lane_names = lane_names
        self._prompt_ids = prompt_ids
        self._head = head
        self._begun: set[int] = set()
        self._no_usage = None if body.include_usage else UNSET

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | None) -> list[ChatChunk]:
        """See :class:`~server.rendering.common.Renderer`. A choice's first chunk brings its role."""
        shown = self._no_usage if usage is None else usage
        chunks = []
        if choice.index not in self._begun:
            role = ChatChunkChoice(choice.index, ChatDelta("assistant", ""), None, None)
            if self._body.report:
                # Empty, so that clients may count on it in every chunk.
                role.collaboration = report(Piece(), self._lane_names, asked_of(choice), check_below=self._check_below)
            chunks.append(self._chunk([role], shown))
            if self._body.return_token_ids and not self._begun:
                chunks[0].prompt_token_ids = self._prompt_ids
            self._begun.add(choice.index)
        delta = ChatDelta(content=piece.text) if piece.text else ChatDelta()
        rendered = ChatChunkChoice(choice.index, delta, self._logprobs(piece), piece.finish_reason)
        self._add_extras(rendered, choice, piece)
        chunks.append(self._chunk([rendered], shown))
        return chunks

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """See :class:`~server.rendering.common.Renderer`."""
        return self._chunk([], usage)

    def response(self, choices: Sequence[Choice], usage: Usage) -> ChatResponse:
        """See :class:`~server.rendering.common.Renderer`."""
        rendered = []
        for choice in choices:
            piece = choice.piece
            message = ChatMessage("assistant", piece.text)
            one = ChatChoice(choice.index, message, self._logprobs(piece), piece.finish_reason)
            self._add_extras(one, choice, piece)
            rendered.append(one)
        head = self._head
        response = ChatResponse(head.id, "chat.completion", head.created, head.model, rendered, head.fingerprint, usage)
        if self._body.return_token_ids:
            response.prompt_token_ids = self._prompt_ids
        if self._body.prompt_logprobs is not None:
            entries = choices[0].piece.prompt_logprobs or []
            response.prompt_logprobs = prompt_logprobs(entries, self._tokenizer, self._body.prompt_logprobs)
        return response

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        head = self._head
        return ChatChunk(head.id, "chat.completion.chunk", head.created, head.model, choices, head.fingerprint, usage)

    def _add_extras(self, rendered: ChatChoice | ChatChunkChoice, choice: Choice, piece: Piece) -> None:
        if self._body.report:
            rendered.collaboration = report(piece, self._lane_names, asked_of(choice), check_below=self._check_below)
        if self._body.return_token_ids:
            rendered.token_ids = piece.tokens

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        content = []
        for token, entry in zip(piece.tokens, piece.logprobs or [], strict=True):
            top = [TopLogprob(*self._entry(other, logprob)) for other, logprob in most_probable(entry)]
            content.append(ChatLogprob(*self._entry(token, entry.logprobs[0]), top))
        return ChatLogprobs(content)

    def _entry(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        return self._shown(token), finite(logprob), list(self._tokenizer.token_bytes(token))

"""Responses and chunks of /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import UNSET, UnsetType

from engine.types import TokenLogprobs
from server.choice import Choice
from server.protocol.completions import CompletionRequest
from server.protocol.responses import CompletionChoice, CompletionResponse, LegacyLogprobs, Usage
from server.rendering.common import (
    Head,
    TokenNames,
    asked_of,
    finite,
    mean_logprob,
    most_probable,
    prompt_logprobs,
    report,
)
from server.text.echo import EchoedPrompt
from server.text.pieces import Piece
from server.text.tokenizer import TextTokenizer


class CompletionRenderer:
    """Renders one request.

    Args:
        prompt_ids: token ids of the prompts.
        prompts: the prompts to be echoed, or None.
        check_below: see :func:`~server.rendering.common.report`.
    """

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: TextTokenizer,
        lane_names: Sequence[str],
        *,
        head: Head,
        prompt_ids: Sequence[list[int]],
        prompts: Sequence[EchoedPrompt] | None,
        check_below: float,
    ) -> None:
        self._check_below = check_below
        self._body = body
        self._tokenizer = tokenizer
        self._shown = TokenNames(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._lane_names = lane_names
        self._prompt_ids = prompt_ids
        self._prompts = prompts
        self._head = head
        self._begun: set[int] = set()
        # With usage asked for, chunks before the last say null; without, they don't mention it.
        self._no_usage = None if body.include_usage else UNSET

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | None) -> list[CompletionResponse]:
        """See :class:`~server.rendering.common.Renderer`."""
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        body = self._choice(choice, piece, choice.index, first=first)
        return [self._wrap([body], self._no_usage if usage is None else usage)]

    def usage_chunk(self, usage: Usage) -> CompletionResponse:
        """See :class:`~server.rendering.common.Renderer`."""
        return self._wrap([], usage)

    def response(self, choices: Sequence[Choice], usage: Usage) -> CompletionResponse:
        """See :class:`~server.rendering.common.Renderer`. Of ``best_of`` candidates the best n are rendered."""
        wanted = self._body.n or 1
        rendered: list[CompletionChoice] = []
        for prompt_index in range(len(self._prompt_ids)):
            candidates = [choice for choice in choices if choice.prompt_index == prompt_index]
            if self._body.candidates > wanted:
                candidates.sort(key=lambda choice: mean_logprob(choice.piece), reverse=True)
            for choice in candidates[:wanted]:
                rendered.append(self._choice(choice, choice.piece, len(rendered), first=True))
        return self._wrap(rendered, usage)

    def _wrap(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> CompletionResponse:
        head = self._head
        return CompletionResponse(
            head.id, "text_completion", head.created, head.model, choices, head.fingerprint, usage
        )

    def _choice(self, choice: Choice, piece: Piece, index: int, *, first: bool) -> CompletionChoice:
        body = self._body
        prompt = self._prompts[choice.prompt_index] if self._prompts is not None else None
        text = piece.text
        if prompt is not None and first:
            text = prompt.text + (prompt.unfinished if choice.prompt_only else text)
        rendered = CompletionChoice(
            text,
            index,
            None if body.logprobs is None else self._logprobs(piece, prompt, first=first),
            piece.finish_reason,
        )
        if body.report:
            rendered.collaboration = report(piece, self._lane_names, asked_of(choice), check_below=self._check_below)
        if body.return_token_ids:
            rendered.token_ids = piece.tokens
            if first:
                rendered.prompt_token_ids = self._prompt_ids[choice.prompt_index]
        if body.prompt_logprobs is not None and first:
            rendered.prompt_logprobs = prompt_logprobs(
                piece.prompt_logprobs or [], self._tokenizer, body.prompt_logprobs
            )
        return rendered

    def _logprobs(self, piece: Piece, prompt: EchoedPrompt | None, *, first: bool) -> LegacyLogprobs:
        result = LegacyLogprobs([], [], [], [])
        offsets = piece.offsets
        if prompt is not None:
            if first:
                # Nothing is known of the first prompt token: there is no position before it.
                entries = [None, *(piece.prompt_logprobs or ())]
                self._append(result, prompt.tokens, prompt.offsets, entries)
            begin = len(prompt.text)
            offsets = [begin + offset for offset in offsets]
        self._append(result, piece.tokens, offsets, piece.logprobs or [])
        return result

    def _append(
        self,
        result: LegacyLogprobs,
        tokens: Iterable[int],
        offsets: Iterable[int],
        entries: Iterable[TokenLogprobs | None],
    ) -> None:
        shown, count = self._shown, self._body.logprobs or 0
        for token, offset, entry in zip(tokens, offsets, entries, strict=True):
            name = shown(token)
            result.tokens.append(name)
            result.text_offset.append(offset)
            if entry is None:
                result.token_logprobs.append(None)
                result.top_logprobs.append(None)
                continue
            written = finite(entry.logprobs[0])
            top: dict[str, float] = {}
            for other, logprob in most_probable(entry)[:count]:
                top.setdefault(shown(other), finite(logprob))
            top.setdefault(name, written)
            result.token_logprobs.append(written)
            result.top_logprobs.append(top)

"""One request while it is served: what has been written so far, and where it must end."""

from __future__ import annotations

from collections.abc import Set

from engine.types import (
    Collaboration,
    Cost,
    Delta,
    ErrorCode,
    FinishReason,
    GenerationRequest,
    Look,
    Token,
    TokenLogprobs,
    WrittenWord,
)

NO_LOOK = Look()


class Sequence:
    """A request and its answer.

    Args:
        eos: ids that end the text, unless the request ignores them.
        room: tokens that may follow the prompt in every lane that takes part.

    Attributes:
        tokens: written token ids, regardless of which lane wrote them.
        seed: the request's own, or one drawn for it.
        prompt_length: number of prompt tokens.
        stop_token_ids: token ids that end the text, once it has ``min_tokens``.
        min_tokens: see there.
        max_output: most tokens that may be written.
        waits_for: the lane without which nothing more is written; None if no decision waits.
        cost: what it has taken so far.
        order: its number in the order of admission.
        queued_at: when it came, in seconds of the scheduler's clock.
        parked_at: since when it has waited for that lane, in seconds of the scheduler's clock.
        timeline: see :class:`~engine.types.Delta`; None if the request did not ask.
    """

    __slots__ = (
        "_delta",
        "_looks",
        "cost",
        "max_output",
        "min_tokens",
        "order",
        "parked_at",
        "prompt_length",
        "queued_at",
        "request",
        "seed",
        "stop_token_ids",
        "timeline",
        "tokens",
        "waits_for",
    )

    def __init__(self, request: GenerationRequest, *, seed: int, eos: Set[int], room: int, lanes: int) -> None:
        sampling = request.sampling
        self.request = request
        self.seed = seed
        self.prompt_length = len(request.prompt)
        # A form ends where it is complete; its masks keep min_tokens and ignore_eos as far as the form lets them.
        follows = sampling.structured_outputs is not None
        self.min_tokens = 0 if follows else sampling.min_tokens
        ignores_eos = sampling.ignore_eos and not follows
        self.stop_token_ids = frozenset(sampling.stop_token_ids) | (frozenset() if ignores_eos else eos)
        self.max_output = min(sampling.max_tokens, room)
        self.tokens: list[int] = []
        self.waits_for: int | None = None
        self.parked_at = 0.0
        self.order = 0
        self.queued_at = 0.0
        self.cost = Cost(prompt_tokens=[0] * lanes, seconds=[0.0] * lanes)
        self.timeline: list[float] | None = [] if request.timeline else None
        self._looks = request.collaboration.looks
        self._delta = Delta(request.request_id)

    def write(self, token: Token) -> None:
        """Append one token."""
        self.tokens.append(token.id)
        delta = self._delta
        delta.tokens.append(token.id)
        delta.sources.append(token.credit)
        delta.deferrals.append(token.deferral)
        if token.text is not None:
            delta.texts.append(token.text)
        if token.support is not None:
            delta.support.append((len(delta.tokens) - 1, token.support))
        if self._looks:
            delta.looks.append(token.look or NO_LOOK)
        if token.vetoed:
            delta.vetoed.append(len(delta.tokens) - 1)
        if token.regretted:
            delta.regretted.append(len(delta.tokens) - 1)
        if token.word is not None:
            length, logprob = token.word
            delta.words.append(WrittenWord(len(delta.tokens) - 1, length, token.credit, logprob))
        if token.logprobs is not None:
            if delta.logprobs is None:
                delta.logprobs = []
            delta.logprobs.append(token.logprobs)

    def note_collaboration(self, collaboration: Collaboration) -> None:
        """Tell with the next delta what is in force."""
        self._delta.collaboration = collaboration

    def note_prompt_logprobs(self, prompt_logprobs: list[TokenLogprobs]) -> None:
        """Keep the prompt's log-probabilities for the next delta."""
        self._delta.prompt_logprobs = prompt_logprobs

    def finish(
        self,
        reason: FinishReason,
        *,
        stop_token: int | None = None,
        error: str | None = None,
        code: ErrorCode | None = None,
        field: str | None = None,
    ) -> None:
        """Note why the request ended; the next delta is its last."""
        self._delta.finish_reason = reason
        self._delta.stop_token = stop_token
        self._delta.error = error
        self._delta.code = code
        self._delta.field = field
        self._delta.refused = code in (ErrorCode.INVALID_REQUEST, ErrorCode.INVALID_GRAMMAR)
        self._delta.timeline = self.timeline

    def take_delta(self) -> Delta:
        """What was gained since the last call."""
        delta, self._delta = self._delta, Delta(self.request.request_id)
        delta.cost = self.cost
        return delta

"""One request's state while it is in the lanes."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.types import BASE, Delta, FinishReason, GenerationRequest, PolicyName, TokenLogprobs

ABSENT = -1


class Sequence:
    """A request, what has been written so far and by whom, and what each lane knows of it.

    There are no phases, only counters: ``known[lane]`` written tokens have been told to a lane, and the lane catches
    up. ``turn`` is the lane whose sample at the current position will be the next token; a sample that comes from any
    other lane, or from another position, is stale and is ignored.

    Attributes:
        tokens: written token ids, whoever wrote them.
        turn: lane that writes the next token. The base until its sample has landed and the policy deferred.
        known: per lane, how many written tokens it has been told; ABSENT if it does not hold the request.
        expert_tokens: how many of the tokens were written by experts.
        parked_at: when the base's row was parked for an expert, in seconds of the scheduler's clock.
        deferral: the deferral probability at the current position, once the base has looked at it.
        draft: the base's own token (with its log-probabilities) at a deferred position, in case the expert is lost.
        timeline: see :class:`~engine.types.Delta`; None if the request did not ask.
    """

    __slots__ = (
        "_delta",
        "deferral",
        "draft",
        "expert_tokens",
        "experts",
        "home",
        "known",
        "parked_at",
        "policy",
        "request",
        "seed",
        "threshold",
        "timeline",
        "tokens",
        "turn",
    )

    def __init__(
        self,
        request: GenerationRequest,
        *,
        lanes: int,
        policy: PolicyName,
        threshold: float,
        experts: Seq[int],
        seed: int,
    ) -> None:
        self.request = request
        self.policy: PolicyName = policy
        self.threshold = threshold
        self.experts = experts
        self.seed = seed
        self.home = request.collaboration.member or BASE
        self.turn = self.home
        self.tokens: list[int] = []
        self.known = [ABSENT] * lanes
        self.expert_tokens = 0
        self.parked_at: float | None = None
        self.deferral: float | None = None
        self.draft: tuple[int, TokenLogprobs | None] | None = None
        self.timeline: list[float] | None = [] if request.timeline else None
        self._delta = Delta(request.request_id)

    @property
    def position(self) -> int:
        """Number of tokens before the next one, prompt included."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def may_defer(self) -> bool:
        """Whether an expert may write the next token at all."""
        limit = self.request.collaboration.max_expert_tokens
        return bool(self.experts) and (limit is None or self.expert_tokens < limit)

    def write(self, token: int, source: int, logprobs: TokenLogprobs | None) -> None:
        """Append one token with its source; the deferral probability is the one noted for this position."""
        self.tokens.append(token)
        self.expert_tokens += source != BASE
        delta = self._delta
        delta.tokens.append(token)
        delta.sources.append(source)
        delta.deferrals.append(self.deferral)
        if self.request.sampling.logprobs is not None:
            assert logprobs is not None
            if delta.logprobs is None:
                delta.logprobs = []
            delta.logprobs.append(logprobs)
        self.deferral = None
        self.draft = None

    def note_prompt_logprobs(self, prompt_logprobs: list[TokenLogprobs]) -> None:
        """Keep the prompt's log-probabilities for the next delta."""
        self._delta.prompt_logprobs = prompt_logprobs

    def finish(
        self,
        reason: FinishReason,
        *,
        stop_token: int | None = None,
        error: str | None = None,
        refused: bool = False,
    ) -> None:
        """Note why the request ended; the next delta is its last."""
        self._delta.finish_reason = reason
        self._delta.stop_token = stop_token
        self._delta.error = error
        self._delta.refused = refused
        self._delta.timeline = self.timeline

    def take_delta(self) -> Delta:
        """What was gained since the last call."""
        delta, self._delta = self._delta, Delta(self.request.request_id)
        return delta

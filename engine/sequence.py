"""One request's state while it is in the lanes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from collections.abc import Set

from engine import draws
from engine.drafts import Draft
from engine.policies import Policy
from engine.types import BASE, Delta, FinishReason, GenerationRequest, TokenLogprobs

ABSENT = -1


class Sequence:
    """A request, what has been written so far and by whom, and what each lane knows of it.

    There are no phases, only counters: ``known[lane]`` tokens have been told to a lane, and the lane catches up.
    Beyond the written tokens there may be a *window* of drafts. It begins with a deferred position; until its expert
    has decided that one, all after it is a guess. A sample that is not for the next open position of the lane that
    brings it is stale and is ignored.

    Attributes:
        tokens: written token ids, whoever wrote them.
        window: drafts beyond them, in order; the first one is deferred.
        known: per lane, how many tokens (written, then drafts) it has been told and are still true; ABSENT if it
            does not hold the request.
        expert_tokens: how many of the tokens were written by experts.
        decider: its policy.
        parked_at: since when the next position has waited for an expert, in seconds of the scheduler's clock.
        prompt_length: number of prompt tokens.
        stops: token ids that end the text, once it has ``min_tokens``.
        room: most tokens that may be written.
        draws: the request's series of policy draws, see :func:`engine.draws.series`.
        evenly: (lane, probability) of each expert where there is no gate to tell.
        run_ahead: most drafts beyond the first; None as many as pay.
        timeline: see :class:`~engine.types.Delta`; None if the request did not ask.
    """

    __slots__ = (
        "_delta",
        "_wants_logprobs",
        "decider",
        "draws",
        "evenly",
        "expert_tokens",
        "experts",
        "home",
        "known",
        "parked_at",
        "prompt_length",
        "request",
        "room",
        "run_ahead",
        "seed",
        "stops",
        "threshold",
        "timeline",
        "tokens",
        "window",
    )

    def __init__(
        self,
        request: GenerationRequest,
        *,
        lanes: int,
        policy: Policy,
        threshold: float,
        experts: Seq[int],
        seed: int,
        eos: Set[int],
        max_model_len: int,
        run_ahead: int | None = 0,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.decider = policy
        self.threshold = threshold
        self.experts = experts
        self.seed = seed
        self.home = request.collaboration.member or BASE
        self.prompt_length = len(request.prompt)
        self.stops = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos)
        self.room = min(sampling.max_tokens, max_model_len - self.prompt_length)
        self.draws = draws.series(seed, draws.POLICY_STREAM)
        self.evenly = [(lane, 1.0 / len(experts)) for lane in experts]
        self.run_ahead = run_ahead
        self.tokens: list[int] = []
        self.window: list[Draft] = []
        self.known = [ABSENT] * lanes
        self.expert_tokens = 0
        self.parked_at: float | None = None
        self.timeline: list[float] | None = [] if request.timeline else None
        self._wants_logprobs = sampling.logprobs is not None
        self._delta = Delta(request.request_id)

    @property
    def position(self) -> int:
        """Number of tokens before the next one, prompt included."""
        return self.prompt_length + len(self.tokens)

    @property
    def turn(self) -> int:
        """The lane that writes the next token."""
        return self.window[0].writer if self.window else self.home

    @property
    def deferred(self) -> int:
        """How many drafts wait for an expert's word."""
        return sum(draft.writer != BASE for draft in self.window)

    def awaits(self, lane: int, position: int) -> bool:
        """Whether a lane's sample at this position is of use."""
        number = position - self.prompt_length
        written = len(self.tokens)
        if lane == self.home:
            # Told of more or of less: the sample is an aborted namesake's, or follows drafts that have been cut.
            return number == written + len(self.window) == self.known[lane]
        return number == written <= self.known[lane] and lane == self.turn

    @property
    def may_defer(self) -> bool:
        """Whether an expert may write the token after the drafts at all."""
        limit = self.request.collaboration.max_expert_tokens
        return bool(self.experts) and (limit is None or self.expert_tokens + self.deferred < limit)

    def extent(self, lane: int) -> tuple[int, tuple[int, ...]]:
        """How many tokens, drafts included, a lane should be told, and at which positions before the end it is asked.

        An expert is told as much as it needs to decide its deferred positions, as far as no other expert comes
        first; the base everything.
        """
        if lane == self.home:
            return len(self.tokens) + len(self.window), ()
        asked = []
        for number, draft in enumerate(self.window):
            if draft.writer == lane:
                asked.append(self.position + number)
            elif draft.writer != BASE:
                break
        *before, last = asked
        return last - self.prompt_length, tuple(before)

    def between(self, begin: int, end: int) -> list[int]:
        """Tokens, written ones then drafts, from index ``begin`` up to but without ``end``."""
        written = len(self.tokens)
        if end <= written:
            return self.tokens[begin:end]
        drafts = [draft.token for draft in self.window[max(begin - written, 0) : end - written]]
        return self.tokens[begin:] + drafts

    def write(self, token: int, source: int, logprobs: TokenLogprobs | None, deferral: float | None) -> None:
        """Append one token with its source and the deferral probability at its position."""
        self.tokens.append(token)
        self.expert_tokens += source != BASE
        delta = self._delta
        delta.tokens.append(token)
        delta.sources.append(source)
        delta.deferrals.append(deferral)
        if self._wants_logprobs:
            assert logprobs is not None
            if delta.logprobs is None:
                delta.logprobs = []
            delta.logprobs.append(logprobs)

    def cut(self) -> None:
        """Forget all drafts: the next token is another than the first of them. Lanes that were told must be cut too."""
        self.window.clear()
        written = len(self.tokens)
        self.known = [min(known, written) for known in self.known]

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

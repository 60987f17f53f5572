"""The collaborative scheduler: who writes the next token of every request.

It is pure. :meth:`Scheduler.plan` says what changed for a lane, :meth:`Scheduler.land` takes in what a lane's step
sampled, :meth:`Scheduler.take_deltas` hands out what requests gained. It does no I/O, knows no model, and is driven
the same way by the step loop and by the tests. Lanes may step in any order, at any pace: a sample counts only if it
comes from the lane whose turn it is, at the position that is open.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from engine import draws
from engine.fair_queue import PROMPT_TOKEN_COST, WRITTEN_TOKEN_COST, FairQueue
from engine.lanes.interface import Extension, LaneRequest, LaneWork, Sample
from engine.policies import NOT_FINITE, POLICIES, Position, read_gate
from engine.sequence import ABSENT, Sequence
from engine.types import BASE, Delta, FinishReason, GenerationRequest, PolicyName, TokenLogprobs

CONFIDENCE_THRESHOLD = 0.5
"""Default threshold of the ``confidence`` policy; a gate artifact's threshold is on another scale."""


LOST = "the step of a lane timed out"


class Scheduler:
    """Queues requests, admits them (fairly between clients), routes every token, ends requests.

    Args:
        lanes: number of lanes; 0 is the base, the others are experts.
        max_num_seqs: most requests in the lanes at once.
        max_model_len: most tokens of a request, prompt and output together.
        vocab_size: token ids are in [0, vocab_size).
        eos_token_ids: end a request unless it ignores them.
        has_gate: whether the base lane's samples carry gate values.
        policy: for requests that name none.
        threshold: for requests that name none.
        refusal: what a lane has against a request, if anything; asked once, before it is queued.
        expert_failure: what becomes of a deferral whose expert is lost: "error" ends the request, "base" lets the
            base's own token stand.
        clock: seconds; a parameter for tests.
    """

    def __init__(
        self,
        *,
        lanes: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int = 1 << 31,
        eos_token_ids: Iterable[int],
        has_gate: bool,
        policy: PolicyName = "threshold",
        threshold: float = 0.5,
        refusal: Callable[[GenerationRequest], str | None] = lambda _: None,
        expert_failure: Literal["error", "base"] = "error",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes = lanes
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self._has_gate = has_gate
        self._policy: PolicyName = policy
        self._threshold = threshold
        self._refusal = refusal
        self._expert_failure = expert_failure
        self._clock = clock
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._running: dict[str, Sequence] = {}
        # Per lane: sequences the lane must be told about, in the order in which they became due.
        self._due: list[dict[str, Sequence]] = [{} for _ in range(lanes)]
        self._removals: list[list[str]] = [[] for _ in range(lanes)]
        # Sequences that gained something, in order. By identity: an id may be used again.
        self._changed: dict[Sequence, None] = {}
        self._expert_waits: list[float] = []
        self._lost: set[int] = set()
        self.gate_errors = 0
        self.expert_failures = 0

    # -- requests ---------------------------------------------------------------------------------------------

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. One that cannot be served ends at once with an error delta, the others are not touched."""
        collaboration = request.collaboration
        experts = collaboration.experts if collaboration.experts is not None else tuple(range(1, self._lanes))
        policy = collaboration.policy or self._policy
        threshold = collaboration.threshold
        if threshold is None:
            threshold = CONFIDENCE_THRESHOLD if policy == "confidence" else self._threshold
        seed = request.sampling.seed
        sequence = Sequence(
            request,
            lanes=self._lanes,
            policy=policy,
            threshold=threshold,
            experts=() if collaboration.member is not None else tuple(dict.fromkeys(experts)),
            seed=secrets.randbits(63) if seed is None else seed,
        )
        problem = self._problem(sequence)
        if problem is None:
            cost = PROMPT_TOKEN_COST * len(request.prompt)
            self._waiting.push(request.request_id, sequence, client=request.client, cost=cost)
        else:
            sequence.finish("error", error=problem, refused=True)
            self._changed[sequence] = None

    def _problem(self, sequence: Sequence) -> str | None:
        request = sequence.request
        member = request.collaboration.member
        if request.request_id in self._running or request.request_id in self._waiting:
            return "request_id is already in use"
        if not request.prompt:
            return "prompt is empty"
        if len(request.prompt) >= self._max_model_len:
            return f"prompt has {len(request.prompt)} tokens, the context is {self._max_model_len}"
        if request.sampling.max_tokens < 1:
            return "max_tokens must be at least 1"
        if member is not None and not 0 <= member < self._lanes:
            return f"member {member} does not exist"
        if any(not 0 < lane < self._lanes for lane in sequence.experts):
            return "experts names a lane that does not exist"
        if member is None and sequence.experts and POLICIES[sequence.policy].needs == "gate" and not self._has_gate:
            return f"policy {sequence.policy!r} needs a gate, and none is served"
        return self._refusal(request)

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is. Unknown ids are ignored: it may have finished meanwhile."""
        sequence = self._running.get(request_id) or self._waiting.remove(request_id)
        if sequence is not None:
            self._end(sequence, "aborted")

    def fail(self, request_id: str, message: str, *, refused: bool) -> None:
        """End a request that a lane cannot go on with. Unknown ids are ignored: it may have finished meanwhile."""
        sequence = self._running.get(request_id)
        if sequence is not None:
            self._end(sequence, "error", error=message, refused=refused)

    # -- lanes ------------------------------------------------------------------------------------------------

    def plan(self, lane: int) -> LaneWork:
        """What a lane has to be told before its next step. Admits waiting requests while there is room."""
        self._admit()
        work = LaneWork(remove=self._removals[lane])
        self._removals[lane] = []
        for request_id, sequence in self._due[lane].items():
            known = sequence.known[lane]
            if known == ABSENT:
                work.add.append(_lane_request(sequence, lane))
            else:
                work.extend.append(Extension(request_id, sequence.tokens[known:]))
            sequence.known[lane] = len(sequence.tokens)
        self._due[lane].clear()
        return work

    def land(self, lane: int, samples: Iterable[Sample]) -> None:
        """Take in what a lane sampled. Stale samples are ignored, see :class:`~engine.sequence.Sequence`."""
        for sample in samples:
            sequence = self._running.get(sample.request_id)
            if (
                sequence is None
                or sequence.turn != lane
                or sequence.position != sample.position
                # Not told of this request yet: the sample is an aborted namesake's.
                or sequence.known[lane] != len(sequence.tokens)
            ):
                continue
            if not 0 <= sample.token < self._vocab_size:
                self._end(sequence, "error", error=f"lane {lane} sampled {sample.token}, which is no token")
                continue
            if sample.prompt_logprobs is not None and lane == sequence.home:
                sequence.note_prompt_logprobs(sample.prompt_logprobs)
            if lane == sequence.home and sequence.experts:
                try:
                    writer = self._decide(sequence, sample)
                except ValueError as error:
                    self.gate_errors += 1
                    self._end(sequence, "error", error=str(error))
                    continue
                if writer != lane:
                    sequence.draft = (sample.token, sample.logprobs)
                    if writer in self._lost:
                        self._without_expert(sequence)
                        continue
                    sequence.turn = writer
                    sequence.parked_at = self._clock()
                    if sequence.timeline is not None:
                        sequence.timeline.append(sequence.parked_at)
                    self._due[writer][sample.request_id] = sequence
                    continue
            self._write(sequence, lane, sample.token, sample.logprobs)

    def lose(self, lane: int) -> None:
        """An expert lane does not come back from its step: requests that wait for it end, or go on without it.

        Until :meth:`regain` the lane must neither be planned for nor stepped; deferrals to it fail at once.
        """
        self._lost.add(lane)
        for sequence in [sequence for sequence in self._running.values() if sequence.turn == lane]:
            self._due[lane].pop(sequence.request.request_id, None)
            if lane == sequence.home:
                self._end(sequence, "error", error=LOST)
            else:
                self._without_expert(sequence)

    def regain(self, lane: int) -> None:
        """The lane's step has ended after all. What it holds is still what it was told."""
        self._lost.discard(lane)

    # -- results ----------------------------------------------------------------------------------------------

    def take_deltas(self) -> list[Delta]:
        """What requests gained since the last call, in the order in which they first gained something."""
        changed, self._changed = self._changed, {}
        return [sequence.take_delta() for sequence in changed]

    def take_expert_waits(self) -> list[float]:
        """Seconds between parking and the expert's token, for each deferral since the last call."""
        waits, self._expert_waits = self._expert_waits, []
        return waits

    @property
    def running(self) -> int:
        """Admitted requests."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """No request anywhere, and no lane has to be told anything."""
        return not (self._running or self._waiting or any(self._removals) or self._changed)

    # -- inside -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            request_id, sequence = self._waiting.pop()
            if sequence.timeline is not None:
                sequence.timeline.append(self._clock())
            if sequence.home in self._lost:
                self._end(sequence, "error", error=LOST)
                continue
            self._running[request_id] = sequence
            self._due[sequence.home][request_id] = sequence

    def _decide(self, sequence: Sequence, sample: Sample) -> int:
        """The lane that writes the open position; notes the deferral probability there."""
        collaboration = sequence.request.collaboration
        policy = POLICIES[sequence.policy]
        experts = sequence.experts
        deferral: float | None
        if sample.gate is not None:
            deferral, weights = read_gate(sample.gate, experts)
            if math.isnan(deferral):
                if policy.needs == "gate":
                    raise ValueError(NOT_FINITE)
                deferral = None
        else:
            deferral, weights = None, [(lane, 1.0 / len(experts)) for lane in experts]
        if policy.needs == "top_probability":
            assert sample.top_probability is not None
            if not 0.0 <= sample.top_probability <= 1.0:
                raise ValueError("the base's top probability is not finite")
            deferral = 1.0 - sample.top_probability
        sequence.deferral = deferral
        if not sequence.may_defer:
            return BASE
        draw = draws.uniform(sequence.seed, draws.POLICY_STREAM, sequence.position)
        return policy.decide(Position(deferral, weights, sequence.threshold, collaboration.rate, draw))

    def _without_expert(self, sequence: Sequence) -> None:
        """The open position was deferred to a lane that is lost."""
        self.expert_failures += 1
        sequence.parked_at = None
        if self._expert_failure == "error":
            self._end(sequence, "error", error=LOST)
            return
        assert sequence.draft is not None
        self._write(sequence, sequence.home, *sequence.draft)

    def _write(self, sequence: Sequence, lane: int, token: int, logprobs: TokenLogprobs | None) -> None:
        request_id = sequence.request.request_id
        if sequence.parked_at is not None:
            now = self._clock()
            self._expert_waits.append(now - sequence.parked_at)
            if sequence.timeline is not None:
                sequence.timeline.append(now)
            sequence.parked_at = None
        sequence.write(token, lane, logprobs)
        self._waiting.charge(sequence.request.client, WRITTEN_TOKEN_COST)
        self._changed[sequence] = None
        sampling = sequence.request.sampling
        written = len(sequence.tokens)
        if written >= sampling.min_tokens and (
            token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos)
        ):
            self._end(sequence, "stop", stop_token=token)
        elif written >= sampling.max_tokens or sequence.position >= self._max_model_len:
            self._end(sequence, "length")
        else:
            sequence.turn = sequence.home
            self._due[sequence.home][request_id] = sequence

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop_token: int | None = None,
        error: str | None = None,
        refused: bool = False,
    ) -> None:
        request_id = sequence.request.request_id
        sequence.finish(reason, stop_token=stop_token, error=error, refused=refused)
        self._changed[sequence] = None
        self._running.pop(request_id, None)
        for lane in range(self._lanes):
            self._due[lane].pop(request_id, None)
            if sequence.known[lane] != ABSENT:
                self._removals[lane].append(request_id)


def _lane_request(sequence: Sequence, lane: int) -> LaneRequest:
    request = sequence.request
    sampling = request.sampling
    if sampling.prompt_logprobs is not None and lane != sequence.home:
        # The prompt is scored once, by the model that the request starts with.
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
    wants_top_probability = (
        lane == BASE and bool(sequence.experts) and POLICIES[sequence.policy].needs == "top_probability"
    )
    return LaneRequest(request.request_id, request.prompt, sequence.tokens.copy(), sampling, wants_top_probability)

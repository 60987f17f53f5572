"""The collaborative scheduler: who writes the next token of every request.

It is pure. :meth:`Scheduler.plan` says what changed for a lane, :meth:`Scheduler.land` takes in what a lane's step
sampled, :meth:`Scheduler.take_deltas` hands out what requests gained. It does no I/O, knows no model, and is driven
the same way by the step loop and by the tests. Lanes may step in any order, at any pace: a sample counts only if it
comes from a lane that was asked for it, at the position that is open.

*Run-ahead*: while a position waits for its expert, the base may draft on as if its own token stood there. The expert
then decides every deferred position of such a window in one visit; the first token that differs from its draft ends
the window. Every lane samples a position with the same noise (see :mod:`engine.draws`), so what is written is, token
for token, what would have been written without: greedy or sampled. That is speculative decoding (Leviathan et al.,
2023) with common random numbers in place of rejection sampling, and only deferred positions can reject.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from engine import draws
from engine.drafts import LONGEST_WINDOW, Draft, window_limit
from engine.fair_queue import PROMPT_TOKEN_COST, WRITTEN_TOKEN_COST, FairQueue
from engine.lanes.interface import Extension, LaneRequest, LaneWork, Sample
from engine.pacing import Agreement, Outlook
from engine.policies import NOT_FINITE, POLICIES, Position, read_gate
from engine.sequence import ABSENT, Sequence
from engine.types import BASE, Delta, FinishReason, GenerationRequest, PolicyName, RunAhead, TokenLogprobs

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
        run_ahead: for requests that do not say: "auto", "off", or how many tokens the base may draft past a deferral.
        worth_drafting: whether a draft that stands with this probability pays; asked where run-ahead is "auto".
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
        run_ahead: RunAhead = "off",
        worth_drafting: Callable[[float], bool] = lambda probability: probability >= 0.5,
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
        self._run_ahead: RunAhead = run_ahead
        self._worth_drafting = worth_drafting
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
        # Per lane: sequences that wait for its word, the longest waiting first.
        self._parked: list[dict[Sequence, None]] = [{} for _ in range(lanes)]
        # Per lane: running requests that it serves alone.
        self._alone = [0] * lanes
        self._agreement = [Agreement() for _ in range(lanes)]
        self.gate_errors = 0
        self.expert_failures = 0
        self.agreements = 0
        self.progress = 0.0
        self.runahead_accepted = 0
        self.runahead_discarded = 0

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
            policy=POLICIES[policy],
            threshold=threshold,
            experts=() if collaboration.member is not None else tuple(dict.fromkeys(experts)),
            seed=secrets.randbits(63) if seed is None else seed,
            eos=self._eos,
            max_model_len=self._max_model_len,
            run_ahead=window_limit(request, self._run_ahead),
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
        if member is None and sequence.experts and sequence.decider.needs == "gate" and not self._has_gate:
            return f"policy {sequence.decider.name!r} needs a gate, and none is served"
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
            known, written = sequence.known[lane], len(sequence.tokens)
            extent, asked = sequence.extent(lane) if sequence.window else (written, ())
            if known == ABSENT:
                work.add.append(_lane_request(sequence, lane, extent, asked))
            elif known < extent:
                tokens = sequence.between(known, extent)
                work.extend.append(Extension(request_id, known, tokens, written, asked))
            else:
                continue  # it has been told before, and is still busy with it
            sequence.known[lane] = extent
        self._due[lane].clear()
        return work

    def land(self, lane: int, samples: Iterable[Sample]) -> None:
        """Take in what a lane sampled. Stale samples are ignored, see :class:`~engine.sequence.Sequence`."""
        for sample in samples:
            sequence = self._running.get(sample.request_id)
            if sequence is None or not sequence.awaits(lane, sample.position):
                continue
            problem = None
            if not 0 <= sample.token < self._vocab_size:
                problem = f"lane {lane} sampled {sample.token}, which is no token"
            if lane == sequence.home:
                self._look(sequence, sample, problem)
            elif problem is None:
                self._hear(sequence, sample)
            else:
                self._end(sequence, "error", error=problem)

    def lose(self, lane: int) -> None:
        """An expert lane does not come back from its step: requests that wait for it end, or go on without it.

        Until :meth:`regain` the lane must neither be planned for nor stepped; deferrals to it fail at once.
        """
        self._lost.add(lane)
        for sequence in [sequence for sequence in self._running.values() if sequence.turn == lane]:
            if lane == sequence.home:
                self._end(sequence, "error", error=LOST)
            else:
                self._unpark(sequence)
                self._without_expert(sequence)

    def regain(self, lane: int) -> None:
        """The lane's step has ended after all. What it holds is still what it was told."""
        self._lost.discard(lane)

    # -- results ----------------------------------------------------------------------------------------------

    def take_deltas(self) -> list[Delta]:
        """What requests gained since the last call, in the order in which they first gained something."""
        changed, self._changed = self._changed, {}
        deltas = []
        served: dict[str, int] = {}
        for sequence in changed:
            delta = sequence.take_delta()
            client = sequence.request.client
            served[client] = served.get(client, 0) + len(delta.tokens)
            deltas.append(delta)
        for client, tokens in served.items():
            self._waiting.charge(client, WRITTEN_TOKEN_COST * tokens)
        return deltas

    def take_expert_waits(self) -> list[float]:
        """Seconds between parking and the expert's token, for each deferral since the last call."""
        waits, self._expert_waits = self._expert_waits, []
        return waits

    def outlook(self, lane: int) -> Outlook:
        """What speaks for stepping an expert's lane now, and what for waiting."""
        parked = self._parked[lane]
        drafting = told_to = 0
        progress = 0.0
        for sequence in self._due[BASE].values():
            progress += self._standing(sequence)
            if sequence in parked:
                drafting += 1
                told_to += sequence.run_ahead is not None
        since = next(iter(parked)).parked_at if parked else None
        return Outlook(len(parked), drafting, told_to, since, progress, self._alone[lane])

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
            self._alone[sequence.home] += sequence.request.collaboration.member is not None
            self._due[sequence.home][request_id] = sequence

    def _look(self, sequence: Sequence, sample: Sample, problem: str | None) -> None:
        """The home lane has sampled the position after all drafts: decide who writes there."""
        if sample.prompt_logprobs is not None:
            sequence.note_prompt_logprobs(sample.prompt_logprobs)
        writer, deferral = sequence.home, None
        if sequence.experts and problem is None:
            try:
                writer, deferral = self._decide(sequence, sample)
            except ValueError as error:
                self.gate_errors += 1
                problem = str(error)
        window = sequence.window
        self.progress += self._standing(sequence) if window else 1.0
        if not window and writer == sequence.home and problem is None:
            # Nobody questions it: by far the most tokens never are drafts.
            if self._write(sequence, sample.token, writer, sample.logprobs, deferral):
                self._due[writer][sample.request_id] = sequence
            return
        window.append(Draft(sample.token, writer, deferral, sample.logprobs, problem))
        if len(window) == 1:
            self._settle(sequence)
        elif writer == sequence.turn:
            self._due[writer][sample.request_id] = sequence
        if window and self._drafts_on(sequence):
            self._due[sequence.home][sample.request_id] = sequence

    def _decide(self, sequence: Sequence, sample: Sample) -> tuple[int, float | None]:
        """The lane that writes the sampled position, and the deferral probability there."""
        policy = sequence.decider
        experts = sequence.experts
        deferral: float | None
        if sample.gate is not None:
            deferral, weights = read_gate(sample.gate, experts)
            if math.isnan(deferral):
                if policy.needs == "gate":
                    raise ValueError(NOT_FINITE)
                deferral = None
        else:
            deferral, weights = None, sequence.evenly
        if policy.needs == "top_probability":
            assert sample.top_probability is not None
            if not 0.0 <= sample.top_probability <= 1.0:
                raise ValueError("the base's top probability is not finite")
            deferral = 1.0 - sample.top_probability
        if not sequence.may_defer:
            return BASE, deferral
        draw = draws.uniform_in(sequence.draws, sample.position) if policy.draws else 0.0
        position = Position(deferral, weights, sequence.threshold, sequence.request.collaboration.rate, draw)
        return policy.decide(position), deferral

    def _standing(self, sequence: Sequence) -> float:
        """Probability that the token after the drafts will stand: that every expert asked before it agrees."""
        if not sequence.window:
            return 1.0
        return self._agreement[sequence.turn].rate ** sequence.deferred

    def _drafts_on(self, sequence: Sequence) -> bool:
        """Whether the base should look at the token after the drafts before the expert has spoken."""
        limit, last = sequence.run_ahead, sequence.window[-1]
        if limit == 0 or last.writer not in (BASE, sequence.turn) or last.error is not None:
            return False
        ahead = len(sequence.window)
        if (
            # All of a window's positions are sampled as ones at which the text may end.
            len(sequence.tokens) < sequence.request.sampling.min_tokens
            or len(sequence.tokens) + ahead >= sequence.room
            or last.token in sequence.stops
        ):
            return False
        if limit is not None:
            return ahead <= limit
        return ahead < LONGEST_WINDOW and self._worth_drafting(self._standing(sequence))

    def _park(self, sequence: Sequence) -> None:
        """The next position waits for its expert from now on."""
        lane = sequence.turn
        if lane in self._lost:
            self._without_expert(sequence)
            return
        sequence.parked_at = self._clock()
        if sequence.timeline is not None:
            sequence.timeline.append(sequence.parked_at)
        self._parked[lane][sequence] = None
        self._due[lane][sequence.request.request_id] = sequence

    def _hear(self, sequence: Sequence, sample: Sample) -> None:
        """The expert has decided the next position."""
        lane, window = sequence.turn, sequence.window
        draft = window[0]
        agreed = draft.token == sample.token
        self._agreement[lane].observe(agreed)
        self.agreements += agreed
        now = self._clock()
        self._expert_waits.append(now - self._unpark(sequence))
        if sequence.timeline is not None:
            sequence.timeline.append(now)
        if agreed:
            self._pop(sequence)
        else:
            self.runahead_discarded += len(window) - 1
            for due in self._due:
                due.pop(sample.request_id, None)
            sequence.cut()
        if self._write(sequence, sample.token, lane, sample.logprobs, draft.deferral):
            self._settle(sequence)

    def _unpark(self, sequence: Sequence) -> float:
        """The next position waits no more; returns since when it has."""
        lane = sequence.turn
        del self._parked[lane][sequence]
        self._due[lane].pop(sequence.request.request_id, None)
        since, sequence.parked_at = sequence.parked_at, None
        assert since is not None
        return since

    def _pop(self, sequence: Sequence) -> Draft:
        """Take the first draft, which stands; those after it have stood the test so far."""
        draft = sequence.window.pop(0)
        if sequence.window:
            self.runahead_accepted += 1
        return draft

    def _settle(self, sequence: Sequence) -> None:
        """Write the drafts that nobody questions any more, up to the next one that waits for an expert."""
        home = sequence.home
        while sequence.window and sequence.window[0].writer == home:
            draft = self._pop(sequence)
            if draft.error is not None:
                self._end(sequence, "error", error=draft.error)
                return
            if not self._write(sequence, draft.token, home, draft.logprobs, draft.deferral):
                return
        if sequence.window:
            self._park(sequence)
        elif sequence.known[sequence.home] < len(sequence.tokens):
            self._due[sequence.home][sequence.request.request_id] = sequence
        # Else the base is already looking at the next position.

    def _without_expert(self, sequence: Sequence) -> None:
        """The next position was deferred to a lane that is lost."""
        self.expert_failures += 1
        if self._expert_failure == "error":
            self._end(sequence, "error", error=LOST)
            return
        draft = self._pop(sequence)
        if self._write(sequence, draft.token, BASE, draft.logprobs, draft.deferral):
            self._settle(sequence)

    def _write(
        self, sequence: Sequence, token: int, lane: int, logprobs: TokenLogprobs | None, deferral: float | None
    ) -> bool:
        """Append one token; False if it ended the request."""
        sequence.write(token, lane, logprobs, deferral)
        self._changed[sequence] = None
        length = len(sequence.tokens)
        if token in sequence.stops and length >= sequence.request.sampling.min_tokens:
            self._end(sequence, "stop", stop_token=token)
            return False
        if length >= sequence.room:
            self._end(sequence, "length")
            return False
        return True

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
        if self._running.pop(request_id, None) is not None and sequence.request.collaboration.member is not None:
            self._alone[sequence.home] -= 1
        self.runahead_discarded += max(0, len(sequence.window) - 1)
        sequence.window.clear()
        for lane in range(self._lanes):
            self._due[lane].pop(request_id, None)
            self._parked[lane].pop(sequence, None)
            if sequence.known[lane] != ABSENT:
                self._removals[lane].append(request_id)


def _lane_request(sequence: Sequence, lane: int, extent: int, asked: tuple[int, ...]) -> LaneRequest:
    request = sequence.request
    sampling = request.sampling
    if sampling.prompt_logprobs is not None and lane != sequence.home:
        # The prompt is scored once, by the model that the request starts with.
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
    if sampling.seed is None and sampling.temperature > 0 and sequence.run_ahead != 0 and sequence.experts:
        # A draft agrees with its expert only by chance unless both lanes draw with the same noise.
        sampling = msgspec.structs.replace(sampling, seed=sequence.seed)
    return LaneRequest(
        request.request_id,
        request.prompt,
        sequence.between(0, extent),
        sampling,
        final=len(sequence.tokens),
        asked=asked,
        wants_top_probability=(lane == BASE and bool(sequence.experts) and sequence.decider.needs == "top_probability"),
    )

"""The collaborative scheduler: admits requests, tells lanes what changed, writes what strategies decide, ends requests.

It is pure. :meth:`Scheduler.plan` says what changed for a lane, :meth:`Scheduler.land` takes in what a lane's step
sampled, :meth:`Scheduler.take_deltas` hands out what requests gained. It does no I/O, knows no model and no method of
writing: who writes which token is decided by :mod:`engine.strategies`. It is driven the same way by the step loop and
by the tests. Lanes may step in any order, at any pace: a sample counts only if it comes from a lane that was asked for
it, at the position that is open.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Series
from itertools import count
from typing import NamedTuple

from engine.fair_queue import PROMPT_TOKEN_COST, WRITTEN_TOKEN_COST, FairQueue
from engine.lane_book import LaneBook
from engine.lanes.interface import Computed, Failure, LaneWork, Refusal, Sample
from engine.sequence import Sequence
from engine.strategies.base import (
    LOST,
    Ask,
    Counters,
    Decision,
    Decoding,
    End,
    Finish,
    Outlook,
    Rejected,
    Scored,
    Strategy,
    Wait,
)
from engine.types import BASE, Delta, ErrorCode, FinishReason, GenerationRequest, Token


class LaneTerms(NamedTuple):
    """What the scheduler knows of a lane's model.

    Attributes:
        max_model_len: most tokens of its prompt and output together.
        vocab_size: its token ids are in [0, vocab_size).
        eos: ids that end a text that starts with this lane, unless the request ignores them.
    """

    max_model_len: int
    vocab_size: int
    eos: frozenset[int]


class Scheduler:
    """Queues requests, admits them (fairly between clients), carries out what their strategies decide, ends them.

    Args:
        lanes: number of lanes; 0 is the base, the others are experts.
        max_num_seqs: most requests in the lanes at once.
        max_model_len: most tokens of a request, prompt and output together.
        vocab_size: token ids are in [0, vocab_size).
        eos_token_ids: end a request unless it ignores them.
        strategy: decides what is written.
        terms: of each lane, where they have vocabularies of their own; None: the arguments above hold for all.
        reject_reason: what a lane has against a request, if anything; asked once, before it is queued.
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
        strategy: Strategy,
        terms: Series[LaneTerms] | None = None,
        reject_reason: Callable[[GenerationRequest], Refusal | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        shared = LaneTerms(max_model_len, vocab_size, frozenset(eos_token_ids))
        self._terms = [shared] * lanes if terms is None else terms
        self._strategy = strategy
        self._reject_reason = reject_reason
        self._clock = clock
        self._books = [LaneBook() for _ in range(lanes)]
        self._waiting: FairQueue[Decoding] = FairQueue()
        self._running: dict[str, Decoding] = {}
        self._admissions = count()
        # Sequences that gained something, in order. By identity: an id may be used again.
        self._changed: dict[Sequence, None] = {}
        self._expert_waits: list[float] = []

    # -- requests ---------------------------------------------------------------------------------------------

    def add(self, request: GenerationRequest, problem: Refusal | None = None) -> None:
        """Queue a request. One that cannot be served ends at once with an error delta, the others are not touched.

        Args:
            problem: what is known to be wrong with it already.
        """
        seed = request.sampling.seed
        starts = self._terms[self._first_lane(request)]
        sequence = Sequence(
            request,
            seed=secrets.randbits(63) if seed is None else seed,
            eos=starts.eos,
            room=min(terms.max_model_len - len(prompt) for terms, prompt in self._prompts(request)),
            lanes=len(self._books),
        )
        sequence.queued_at = self._clock()
        try:
            if problem is not None:
                raise Rejected(*problem)
            decoding = self._begin(sequence)
        except Rejected as rejected:
            sequence.finish("error", error=str(rejected), code=rejected.code, field=rejected.field)
            self._changed[sequence] = None
        else:
            sequence.note_collaboration(decoding.in_force())
            cost = PROMPT_TOKEN_COST * sum(map(len, request.all_prompts))
            self._waiting.push(request.request_id, decoding, client=request.client, cost=cost)

    def _begin(self, sequence: Sequence) -> Decoding:
        request = sequence.request
        if request.request_id in self._running or request.request_id in self._waiting:
            raise Rejected("request_id is already in use")
        for terms, prompt in self._prompts(request):
            if not prompt:
                raise Rejected("prompt is empty")
            if len(prompt) >= terms.max_model_len:
                raise Rejected(f"prompt has {len(prompt)} tokens, the context is {terms.max_model_len}")
        if request.sampling.max_tokens < 1:
            raise Rejected("max_tokens must be at least 1")
        decoding = self._strategy.begin(sequence)
        if (reason := self._reject_reason(request)) is not None:
            raise Rejected(*reason)
        return decoding

    def _prompts(self, request: GenerationRequest) -> list[tuple[LaneTerms, list[int]]]:
        """A request's prompts, each with the terms of the lane that it is for."""
        prompts = [(self._first_lane(request), request.prompt), *request.collaboration.prompts]
        known = range(len(self._terms))
        return [(self._terms[lane if lane in known else BASE], prompt) for lane, prompt in prompts]

    def _first_lane(self, request: GenerationRequest) -> int:
        """The lane that the request's own prompt is for; the base's where there is no such member."""
        member = request.collaboration.member
        return BASE if member is None or not 0 <= member < len(self._terms) else member

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is. Unknown ids are ignored: it may have finished meanwhile."""
        decoding = self._running.get(request_id) or self._waiting.remove(request_id)
        if decoding is not None:
            self._end(decoding, "aborted")

    def fail(self, failure: Failure) -> None:
        """End a request that a lane cannot go on with. Unknown ids are ignored: it may have finished meanwhile."""
        decoding = self._running.get(failure.request_id)
        if decoding is not None:
            self._end(decoding, "error", because=End(failure.message, failure.code))

    # -- lanes ------------------------------------------------------------------------------------------------

    def plan(self, lane: int) -> LaneWork:
        """What a lane has to be told before its next step. Admits waiting requests while there is room."""
        self._admit()
        book = self._books[lane]
        work = LaneWork(remove=book.removals)
        book.removals = []
        for request_id, decoding in book.due.items():
            if request_id not in book.holds:
                book.holds.add(request_id)
                primary = lane == decoding.primary_lane
                work.add.append(decoding.open(lane)._replace(order=decoding.answer.order, primary=primary))
            elif (extension := decoding.extend(lane)) is not None:
                work.extend.append(extension)
        if book.due:
            book.told, book.due = book.due, {}
        return work

    def asks(self, lane: int) -> bool:
        """Whether a lane is to be told anything that it has to compute."""
        return bool(self._books[lane].due) or len(self._waiting) > 0

    def land(self, lane: int, samples: Iterable[Sample]) -> float:
        """Take in what a lane sampled; stale samples are ignored.

        Returns:
            How many tokens the base's samples have brought, or may be expected to have brought.
        """
        gained = 0.0
        running = self._running
        vocab_size = self._terms[lane].vocab_size
        for sample in samples:
            decoding = running.get(sample.request_id)
            if decoding is None or not decoding.awaits(lane, sample.position):
                continue
            fault = None
            if not 0 <= sample.token < vocab_size:
                fault = End(f"lane {lane} sampled {sample.token}, which is no token", ErrorCode.BAD_READING)
            if lane == decoding.primary_lane:
                if sample.prompt_logprobs is not None:
                    decoding.answer.note_prompt_logprobs(sample.prompt_logprobs)
                if lane == BASE:
                    gained += decoding.expected_gain()
            elif fault is not None:
                self._end(decoding, "error", because=fault)
                continue
            if decoding.answer.waits_for == lane:
                self._note_wait(decoding)
            self._carry_out(decoding, decoding.on_sample(lane, sample, fault))
        return gained

    def charge(self, computed: Series[Computed], seconds: float) -> None:
        """Note what a step that took so long has computed, to whoever it was for. Before its samples are landed."""
        running = self._running
        each = seconds / max(1, sum([row.tokens for row in computed]))
        for lane, request_id, tokens, prompt_tokens, cached_tokens in computed:
            decoding = running.get(request_id)
            if decoding is None:
                continue
            cost = decoding.answer.cost
            cost.seconds[lane] += each * tokens
            if prompt_tokens:
                cost.prompt_tokens[lane] += prompt_tokens
            if cached_tokens and lane == decoding.primary_lane:
                cost.cached_tokens += cached_tokens

    def lose(self, lane: int) -> None:
        """A lane does not come back from its step: requests that wait for it end, or go on without it.

        Until :meth:`regain` the lane must neither be planned for nor stepped; waiting for it fails at once.
        """
        self._books[lane].lost = True
        for decoding in list(self._running.values()):
            if decoding.answer.waits_for == lane:
                self._resume(decoding)
                self._carry_out(decoding, decoding.on_lane_lost(lane))
            elif decoding.answer.waits_for is None and decoding.needs(lane):
                self._end(decoding, "error", because=LOST)

    def regain(self, lane: int) -> None:
        """The lane's step has ended after all. What it holds is still what it was told."""
        self._books[lane].lost = False

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
        """Seconds between parking and the awaited sample, for each wait since the last call."""
        waits, self._expert_waits = self._expert_waits, []
        return waits

    def outlook(self, lane: int, *, under_way: bool = False) -> Outlook:
        """Inputs to the gather decision for one expert lane.

        Args:
            under_way: what the base was told last has not come back yet; it counts like what it is to be told next.
        """
        book, base = self._books[lane], self._books[BASE]
        parked = book.parked
        drafting = fixed_window = 0
        progress = 0.0
        for decoding in (base.told | base.due if under_way else base.due).values():
            progress += decoding.expected_gain()
            if decoding in parked:
                drafting += 1
                fixed_window += decoding.fixed_window
        since = next(iter(parked)).answer.parked_at if parked else None
        return Outlook(len(parked), drafting, fixed_window, since, progress, book.started)

    @property
    def counters(self) -> Counters:
        """What the strategies count."""
        return self._strategy.counters

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
        return not (self._running or self._waiting or any(book.removals for book in self._books) or self._changed)

    # -- inside -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            request_id, decoding = self._waiting.pop()
            sequence = decoding.answer
            now = self._clock()
            sequence.cost.queue_seconds = now - sequence.queued_at
            if sequence.timeline is not None:
                sequence.timeline.append(now)
            book = self._books[decoding.primary_lane]
            if book.lost:
                self._end(decoding, "error", because=LOST)
                continue
            self._running[request_id] = decoding
            sequence.order = next(self._admissions)
            book.started += 1
            book.due[request_id] = decoding
            self._carry_out(decoding, decoding.on_admitted())

    def _carry_out(self, decoding: Decoding, decisions: Iterable[Decision]) -> bool:
        """Do what was decided, in order; False if it ended the request."""
        for decision in decisions:
            if type(decision) is Token:
                sequence = decoding.answer
                sequence.write(decision)
                self._changed[sequence] = None
                length = len(sequence.tokens)
                if decision.id in sequence.stop_token_ids and length >= sequence.min_tokens:
                    self._end(decoding, "stop", stop_token=decision.id)
                    return False
                if length >= sequence.max_output:
                    self._end(decoding, "length")
                    return False
            elif type(decision) is Ask:
                self._books[decision.lane].due[decoding.answer.request.request_id] = decoding
            elif type(decision) is Wait:
                if not self._wait(decoding, decision.lane):
                    return False
            elif type(decision) is Scored:
                decoding.answer.note_prompt_logprobs(decision.entries)
            elif type(decision) is Finish:
                self._end(decoding, decision.reason)
                return False
            else:
                assert type(decision) is End
                self._end(decoding, "error", because=decision)
                return False
        return True

    def _wait(self, decoding: Decoding, lane: int) -> bool:
        """Let a request wait for a lane; False if that ended it, since the lane is lost."""
        book = self._books[lane]
        if book.lost:
            return self._carry_out(decoding, decoding.on_lane_lost(lane))
        sequence = decoding.answer
        sequence.waits_for = lane
        sequence.parked_at = self._clock()
        if sequence.timeline is not None:
            sequence.timeline.append(sequence.parked_at)
        book.parked[decoding] = None
        book.due[sequence.request.request_id] = decoding
        return True

    def _note_wait(self, decoding: Decoding) -> None:
        """The lane that was waited for has spoken."""
        sequence = decoding.answer
        now = self._clock()
        self._expert_waits.append(now - sequence.parked_at)
        if sequence.timeline is not None:
            sequence.timeline.append(now)
        self._resume(decoding)

    def _resume(self, decoding: Decoding) -> None:
        """The request waits no more, and its lane need not be asked any more."""
        sequence = decoding.answer
        assert sequence.waits_for is not None
        book = self._books[sequence.waits_for]
        del book.parked[decoding]
        book.due.pop(sequence.request.request_id, None)
        sequence.waits_for = None

    def _end(
        self,
        decoding: Decoding,
        reason: FinishReason,
        *,
        stop_token: int | None = None,
        because: End | None = None,
    ) -> None:
        sequence = decoding.answer
        request_id = sequence.request.request_id
        error, code = (None, None) if because is None else (because.message, because.code)
        sequence.finish(reason, stop_token=stop_token, error=error, code=code)
        self._changed[sequence] = None
        if self._running.pop(request_id, None) is not None:
            self._books[decoding.primary_lane].started -= 1
        decoding.on_end()
        for book in self._books:
            book.end(request_id, decoding)

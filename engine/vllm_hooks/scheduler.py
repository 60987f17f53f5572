"""The scheduler's side of a lane: park, extend, cut, and eviction of parked rows.

vLLM's scheduler knows no phases, only counters that catch up: a running request whose tokens are all computed is
skipped and keeps its KV blocks. That is *parking*, and it needs nothing but not appending the sampled token.
*Extending* appends what was decided, and the request catches up again. *Cutting* takes tokens back that were drafts:
the counter of computed tokens goes back with them, and what the KV cache holds beyond it is overwritten.

Steps may be scheduled before the samples of the last one are known; see :mod:`engine.vllm_hooks.flight`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from engine.lanes.interface import Extension, Failure, LaneRequest, Part
from engine.types import ErrorCode
from engine.vllm_hooks.flight import Flight, FlyingRow, Landed, may_look_ahead
from engine.vllm_hooks.parking import Speed, idle_row
from engine.vllm_hooks.state import keep_windows_for_cuts
from engine.vllm_hooks.wire import EDITS, Edit, LaneEdits


class _Row(msgspec.Struct):
    """What the lane knows of a request beyond vLLM's own record.

    Attributes:
        request: vLLM's record.
        final: number of tokens, prompt included, that can no longer be cut.
        asked: positions before the end at which a sample is still to be taken, in order.
        synced: how many leading output tokens the runner's own copy has right.
        followed: how many output tokens the runner's last sample followed; -1 if that is of no interest any more.
        sample: the runner's last sample.
        part: the lane's part in the request's blend.
        draw_offset: see LaneRequest.
        scores: see LaneRequest.
        may_idle: the request may go on without this row, for nobody knows how long.
        sampled_at: how many output tokens ``sample`` followed, if the lane has heard of it; else -1.
        looks_ahead: whether the row may be computed past its sample before anybody has decided on that.
        stands: whether its last sample was what it went on with.
        ahead: the step that computes it past its sample, as long as nobody has said that the sample stands.
    """

    request: Request
    final: int
    asked: list[int]
    synced: int = 0
    followed: int = -1
    sample: int = -1
    part: Part | None = None
    draw_offset: int = 0
    scores: bool = False
    may_idle: bool = False
    sampled_at: int = -1
    looks_ahead: bool = False
    stands: bool = True
    ahead: FlyingRow | None = None


class LaneScheduler(Scheduler):
    """vLLM's scheduler with parked rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Parked rows whose KV blocks were taken. They stay out of the waiting queue until they are extended:
        # recomputing them earlier would only sample a position again that nobody waits for.
        self._evicted: dict[str, Request] = {}
        # Since when requests are parked, the longest parked first.
        self._parked: dict[str, float] = {}
        self.speed = Speed()
        self._rows: dict[str, _Row] = {}
        self._wants_top_probability: set[str] = set()
        # Requests whose text is scored: what they are told as written is their prompt.
        self.scoring: set[str] = set()
        # Requests whose grammar is being compiled in another thread; vLLM's queues do not know them yet.
        self._compiling: dict[str, tuple[Request, list[int]]] = {}
        self._failures: list[Failure] = []
        # Steps that have been scheduled and not collected, the oldest first.
        self._flights: deque[Flight] = deque()
        self.runner_records = True
        """Whether the workers take down what they sample; else they are told of it along with all other tokens."""
        self.looks_ahead = False
        """Whether rows are computed past samples that nobody has read."""
        self.num_preemptions = 0
        # What waits did not get the memory that it needs in the last step, and none was freed since.
        self._starved = False
        self._may_evict = False
        manager = self.kv_cache_manager
        coordinator = manager.coordinator
        keep_windows_for_cuts(coordinator)
        # Of the request that is being looked up.
        self._longest_hit = 0
        manager.get_computed_blocks = partial(self._get_computed_blocks, manager.get_computed_blocks)
        coordinator.find_longest_cache_hit = partial(self._find_cache_hit, coordinator.find_longest_cache_hit)
        coordinator.cache_blocks = partial(self._cache_blocks, coordinator.cache_blocks)

    # -- what the lane calls ----------------------------------------------------------------------------------

    def add_lane_request(
        self, request: Request, added: LaneRequest, on_ready: Callable[[], None], *, looks_ahead: bool = True
    ) -> None:
        """Queue a request, some of whose output tokens may exist already.

        Args:
            on_ready: called from another thread when the request's grammar, if it has one, is compiled.
            looks_ahead: whether what the lane samples is likely to be written.
        """
        written = added.written
        # vLLM's own report on prefills, which nobody reads here. It takes a cached prefix beyond the prompt for an
        # error, and written tokens that another request wrote before may well be cached.
        request.prefill_stats = None
        final = request.num_prompt_tokens + added.final
        self._rows[request.request_id] = _Row(
            request,
            final,
            list(added.asked),
            part=added.part,
            draw_offset=added.draw_offset,
            scores=added.scores,
            may_idle=not added.primary,
            looks_ahead=self.looks_ahead and looks_ahead and may_look_ahead(request, added),
        )
        if added.wants_top_probability:
            self._wants_top_probability.add(request.request_id)
        if added.scores:
            self.scoring.add(request.request_id)
        structured = request.structured_output_request
        if structured is None or isinstance(structured._grammar, StructuredOutputGrammar):
            self._enqueue(request, written)
            return
        self._compiling[request.request_id] = (request, written)
        self.structured_output_manager.grammar_init(request)
        if isinstance(structured._grammar, Future):
            structured._grammar.add_done_callback(lambda _: on_ready())

    def _enqueue(self, request: Request, written: list[int]) -> None:
        self.add_request(request)
        self._starved = False
        if written:
            request.append_output_token_ids(written)
            if request.structured_output_request is not None:
                self._accept(request, written)

    def settle_grammars(self) -> list[Failure]:
        """Queue the requests whose grammar is ready; returns what has failed since the last call."""
        for request_id, (request, written) in list(self._compiling.items()):
            grammar = request.structured_output_request.grammar
            if grammar is None:
                continue
            del self._compiling[request_id]
            if isinstance(grammar, Exception):
                message = f"the grammar cannot be compiled: {grammar}"
                self._failures.append(Failure(request_id, message, ErrorCode.INVALID_GRAMMAR))
            else:
                self._enqueue(request, written)
        failures, self._failures = self._failures, []
        return failures

    def mask_failures(self, request_ids: Iterable[str]) -> list[Failure]:
        """Requests of a step whose mask could not be made; their samples are not to be used."""
        failures = []
        for request_id in request_ids:
            request = self.requests[request_id]
            problem = getattr(request.structured_output_request.grammar, "problem", None)
            if problem is not None:
                failures.append(Failure(request_id, problem, ErrorCode.INVALID_GRAMMAR))
        return failures

    def _accept(self, request: Request, tokens: list[int]) -> None:
        """Advance the request's grammar by decided tokens."""
        if not self.structured_output_manager.accept_tokens(request, tokens):
            problem = getattr(request.structured_output_request.grammar, "problem", None)
            if problem is not None:
                failure = Failure(request.request_id, problem, ErrorCode.INVALID_GRAMMAR)
            else:
                # Every lane masks what the grammar forbids, so this token should not exist.
                failure = Failure(request.request_id, "a written token breaks the grammar", ErrorCode.LANE_FAILURE)
            self._failures.append(failure)

    def extend(self, extension: Extension) -> int:
        """Cut a request if need be, append tokens, and make it runnable again. Returns its catch-up tokens."""
        request_id, keep, tokens = extension.request_id, extension.keep, extension.tokens
        row = self._rows[request_id]
        request = row.request
        output, text = request._output_token_ids, request._all_token_ids
        followed = row.followed
        if followed == keep:
            row.synced = keep + (tokens[0] == row.sample)
        elif followed < 0:
            row.synced = min(row.synced, keep)
        else:
            row.synced = min(keep, followed)
        row.followed = -1
        if row.looks_ahead or self._flights:
            self._follow(row, keep, tokens)
        if keep < len(output):
            self._cut(request, keep)
        output.extend(tokens)
        text.extend(tokens)
        if len(text) // self.hash_block_size > len(request.block_hashes):
            # Most tokens fill no block.
            request.update_block_hashes()
        row.final = request.num_prompt_tokens + extension.final
        if row.asked or extension.asked:
            row.asked = list(extension.asked)
        if request.structured_output_request is not None:
            self._accept(request, tokens)
        if request.num_computed_tokens < len(text):
            self._parked.pop(request_id, None)
        if self._evicted and self._evicted.pop(request_id, None) is not None:
            self.waiting.add_request(request)
            self._starved = False
        return 0 if row.scores else len(tokens) - 1

    def _follow(self, row: _Row, keep: int, tokens: list[int]) -> None:
        """Tell steps that are under way what became of a row: its sample there counts only if this was foreseen."""
        request = row.request
        row.stands = keep == row.sampled_at == request.num_output_tokens and tokens[0] == row.sample
        ahead, row.ahead = row.ahead, None
        if ahead is not None:
            request.num_output_placeholders = 0
            if row.stands:
                ahead.foreseen = True
                ahead.wanted = len(tokens) == 1
                return
            request.num_computed_tokens = request.num_tokens
        self._void(request.request_id)

    def _void(self, request_id: str) -> None:
        for flight in self._flights:
            if (flying := flight.rows.get(request_id)) is not None:
                flying.wanted = False

    def _cut(self, request: Request, keep: int) -> None:
        """Take output tokens back, all but the first ``keep``. Its KV blocks stay, to be overwritten."""
        length = request.num_prompt_tokens + keep
        del request._output_token_ids[keep:]
        del request._all_token_ids[length:]
        del request.block_hashes[length // self.hash_block_size :]
        request.num_computed_tokens = min(request.num_computed_tokens, length)

    def remove(self, request_ids: Iterable[str]) -> None:
        """Drop requests and free their KV blocks. Unknown ids are ignored."""
        for request_id in request_ids:
            for table in self._tables:
                table.pop(request_id, None)
            self._void(request_id)
            self._wants_top_probability.discard(request_id)
            self.scoring.discard(request_id)
        self.finish_requests(set(request_ids), RequestStatus.FINISHED_ABORTED)
        self._starved = False

    def collect(self, scheduled: SchedulerOutput, output: ModelRunnerOutput, asked: list[int]) -> list[Landed]:
        """Take in a step's output: every sampled row is parked, none of the samples is appended.

        Stands in for vLLM's ``update_from_output``: stop conditions, streaming and statistics are decided elsewhere.

        Args:
            asked: the samples at the asked positions, in the order of :class:`~engine.vllm_hooks.wire.LaneEdits`.
        """
        landed = []
        flight = self._flights.popleft()
        for number, (request, position) in enumerate(flight.asked):
            row = self._rows.get(request.request_id)
            if row is not None and row.request is request:
                landed.append(Landed(request, position, asked[number], number, asked=True))
        for request_id, flying in flight.rows.items():
            request = flying.request
            request.num_in_flight_tokens -= flying.tokens
            if request.num_stale_output_tokens:
                # A row that was preempted meanwhile is not scheduled again before this has come to nothing.
                request.num_stale_output_tokens = max(0, request.num_stale_output_tokens - flying.tokens)
                self._starved = False
            if flying.position < 0 or not flying.wanted:
                continue  # an unfinished chunk, or overtaken by what became of the row
            ours = self._rows[request_id]
            if not flying.foreseen:
                # Nobody has said that the sample before this one stands; if it does after all, this is computed again.
                ours.ahead, ours.stands = None, False
                request.num_output_placeholders = 0
                request.num_computed_tokens = request.num_tokens
                continue
            index = output.req_id_to_index[request_id]
            (token,) = output.sampled_token_ids[index]
            ours.sample, ours.sampled_at = token, flying.position - request.num_prompt_tokens
            if self.runner_records:
                ours.followed = ours.sampled_at
            landed.append(Landed(request, flying.position, token, index, asked=False))
        return landed

    def has_runnable(self) -> bool:
        """Whether a step would compute anything, or tell of a failure."""
        if self._failures or any(
            request.structured_output_request.is_grammar_ready for request, _ in self._compiling.values()
        ):
            return True
        if len(self._parked) - len(self._evicted) < len(self.running):
            return True
        if self.waiting and (not self._starved or self._idle_row() is not None):
            return True
        return bool(self._flights) and any(map(self._can_look_ahead, self._flights[-1].ends))

    def _can_look_ahead(self, row: _Row) -> bool:
        """Of a row that is at its end in the last step."""
        request = row.request
        return (
            row.stands
            and row.ahead is None
            and row.request.status == RequestStatus.RUNNING
            and self._rows.get(request.request_id) is row
            and self._flights[-1].rows[request.request_id].wanted
            and request.num_computed_tokens == request.num_tokens
            and request.num_tokens + 2 < self.max_model_len
            and request.num_output_tokens >= request.sampling_params.min_tokens
        )

    @property
    def starved(self) -> int | None:
        """The order of the first request that waits for the memory (or the place) of a parked row, if one does."""
        return self.waiting.peek_request().priority if self._starved and self.waiting else None

    def make_room(self) -> None:
        """Let the next step evict parked rows, if it has nothing else to compute."""
        self._starved = False
        self._may_evict = True

    @property
    def is_compiling(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._compiling)

    def bookkeeping(self) -> list[str]:
        """Requests that any of the lane's own tables still knows."""
        return sorted(self._wants_top_probability.union(*self._tables))

    @property
    def _tables(self) -> tuple[dict[str, Any], ...]:
        return (
            self._evicted,
            self._parked,
            self._rows,
            self._compiling,
        )

    # -- what vLLM calls --------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's schedule, with the edits that the workers need; evicts parked rows where that was allowed."""
        ahead = list(filter(self._can_look_ahead, self._flights[-1].ends)) if self._flights else []
        for row in ahead:
            row.request.num_output_placeholders = 1
        if self._starved and (idle := self._idle_row()) is not None:
            self._evict(idle)
        output = super().schedule(throttle_prefills)
        while not output.total_num_scheduled_tokens and self.waiting and self._may_evict and (parked := self._held()):
            self._evict(max(parked, key=lambda request: request.priority))
            finished, preempted = output.finished_req_ids, output.preempted_req_ids or set()
            output = super().schedule(throttle_prefills)
            output.finished_req_ids |= finished
            output.preempted_req_ids = preempted | (output.preempted_req_ids or set())
        self._may_evict = False
        self._starved = bool(self.waiting) and self._lacked_memory(output)
        # Whole texts of rows that sat out a step, a context's length for each visit on the way to the workers. Only
        # asynchronous scheduling reads them.
        output.scheduled_cached_reqs.all_token_ids.clear()
        edits: dict[str, Edit] = {}
        asked: dict[str, list[int]] = {}
        parts: dict[str, Part] = {}
        offsets: dict[str, int] = {}
        scored: set[str] = set()
        flight = Flight()
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            row = self._rows[request_id]
            request = row.request
            if row.part is not None:
                parts[request_id] = row.part
            if row.draw_offset:
                offsets[request_id] = row.draw_offset
            if row.asked:
                begin = request.num_computed_tokens - num_tokens
                if indices := [position - 1 - begin for position in _pass(row)]:
                    asked[request_id] = indices
                    flight.asked += [(request, begin + index + 1) for index in indices]
                    if row.scores:
                        scored.add(request_id)
            if row.synced < request.num_output_tokens:
                edits[request_id] = Edit(row.synced, request._output_token_ids[row.synced :])
                row.synced = request.num_output_tokens
            at_end = request.num_computed_tokens >= request.num_tokens
            flight.rows[request_id] = FlyingRow(request, num_tokens, request.num_computed_tokens if at_end else -1)
            if at_end:
                self._parked[request_id] = time.monotonic()
                if row.looks_ahead:
                    flight.ends.append(row)
        for row in ahead:
            request = row.request
            if request.num_computed_tokens > request.num_tokens:
                row.ahead = flight.rows[request.request_id]
                row.ahead.foreseen = False
            else:
                request.num_output_placeholders = 0
        self._flights.append(flight)
        wanted = self._wants_top_probability
        setattr(
            output,
            EDITS,
            LaneEdits(
                edits,
                bool(wanted) and not wanted.isdisjoint(output.num_scheduled_tokens),
                asked,
                parts,
                offsets,
                tuple(row.request.request_id for row in ahead if row.ahead is not None),
                frozenset(scored),
            ),
        )
        return output

    def _lacked_memory(self, output: SchedulerOutput) -> bool:
        """Whether it was for memory (or a place) that a step has not begun with what waits."""
        if not output.total_num_scheduled_tokens:
            return True
        # After a preemption vLLM does not look at what waits. Without chunks of any length the first of it may be too
        # long for what was left of the step.
        return (
            not output.preempted_req_ids
            and self.scheduler_config.enable_chunked_prefill
            and not self.need_mamba_block_aligned_split
            and output.total_num_scheduled_tokens < self.max_num_scheduled_tokens
        )

    def schedule_nothing(self) -> SchedulerOutput:
        """For the workers of an idle lane: whom they can forget. Nobody will collect it."""
        output = self.schedule()
        self._flights.pop()
        return output

    def _get_computed_blocks(self, get: Callable[[Request], Any], request: Request) -> Any:
        """Look up the prefix cache, but no further than the request may share blocks with others.

        What has to be sampled must be computed even if it is cached. And a draft's block must be the request's own:
        after a cut it is overwritten, while others read what they share.
        """
        row = self._rows[request.request_id]
        self._longest_hit = min(row.final, row.asked[0] - 1) if row.asked else row.final
        return get(request)

    def _find_cache_hit(self, find: Callable[..., Any], block_hashes: Any, max_cache_hit_length: int) -> Any:
        return find(block_hashes, min(max_cache_hit_length, self._longest_hit))

    def _cache_blocks(self, cache: Callable[..., None], request: Request, num_computed_tokens: int) -> None:
        """Publish hashes of blocks only as far as their tokens cannot be cut any more."""
        cache(request, min(num_computed_tokens, self._rows[request.request_id].final))

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.num_preemptions += 1
        row = self._rows[request.request_id]
        if row.ahead is not None:
            row.ahead.wanted, row.ahead = False, None
        if request.request_id in self._parked:
            self.waiting.remove_request(request)
            self._evicted[request.request_id] = request

    def _held(self) -> list[Request]:
        """Parked rows that hold KV blocks, the longest parked first."""
        return [self.requests[request_id] for request_id in self._parked if request_id not in self._evicted]

    def _idle_row(self) -> Request | None:
        now = time.monotonic()
        idle = (
            (request, now - self._parked[request.request_id])
            for request in self._held()
            if self._rows[request.request_id].may_idle
        )
        return idle_row(idle, self.speed.seconds_per_token, len(self.running))

    def _evict(self, request: Request) -> None:
        """Take a parked row's KV blocks."""
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())


def _pass(row: _Row) -> list[int]:
    """Take out the asked positions that the step which was just scheduled passes."""
    passed = [position for position in row.asked if position <= row.request.num_computed_tokens]
    row.asked = row.asked[len(passed) :]
    return passed

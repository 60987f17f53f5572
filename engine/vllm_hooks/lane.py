"""A lane on vLLM: an ``EngineCore`` (its scheduler and executor) driven directly."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import msgspec
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from engine.grammar.checker import Templates
from engine.lanes.interface import Computed, Failure, LaneReport, LaneWork, Launched, Refusal, Sample
from engine.lanes.shelf import Shelf
from engine.stats import LaneStats
from engine.types import (
    ErrorCode,
    GenerationRequest,
    LaneInfo,
    SamplingSpec,
    StructuredOutputs,
)
from engine.vllm_hooks import processor, runner
from engine.vllm_hooks.account import account, count
from engine.vllm_hooks.grammars import LaneGrammar, VllmForms, setup_of
from engine.vllm_hooks.guest import GuestLane, lora_request
from engine.vllm_hooks.hashes import PromptHashes
from engine.vllm_hooks.logprobs import prompt_logprobs, row_logprobs
from engine.vllm_hooks.masses import MassReader
from engine.vllm_hooks.memory import memory_notes
from engine.vllm_hooks.sampling import seed_of
from engine.vllm_hooks.scheduler import LaneScheduler
from engine.vllm_hooks.state import what_cannot_be_cut
from engine.vllm_hooks.wire import READINGS, SETTINGS_KEY, Readings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import BlockHash

    from engine.grammar.worker import Setup
    from engine.spelling.vocabulary import Vocabulary
    from engine.vllm_hooks.adapters import LaneAdapter

_NO_READINGS = Readings(None, None, [], None, {}, {}, 0.0)
_USAGE = None if current_platform.is_cpu() else UsageContext.OPENAI_API_SERVER
"""On a GPU prompts are computed in chunks as large as vLLM's own server takes."""


class VllmLane:
    """See :class:`engine.lanes.interface.Lane` for the contract.

    Args:
        name: "base", or the expert's name.
        arguments: for vLLM's ``EngineArgs``, from :func:`engine.vllm_hooks.options.engine_arguments`.
        eos_token_ids: of the served pair, as far as this model has an output for them; the first one is the primary.
        private_ends: those of the pair's that not every member has; a text that goes on past its end must not have
            them.
        hashes: shared by the lanes of an engine.
        templates: compiled forms, shared by the lanes of an engine.
        on_ready: called from another thread when the lane has work that it had not before.
        on_failure: called from another thread when a worker process dies.
        adapter: which the lane's own rows are computed with.
        guests: adapters that have lanes of their own in this one's steps; see :meth:`guest_lanes`.
        number: the lane's number.
        shelf: shared by the lanes of an engine, for blends; used if the lane computes in this process.
        vocabulary: its text tokens, for members that write by characters; likewise.
        depth: see :class:`engine.lanes.interface.Lane`; used likewise. From 2 on rows look ahead, see
            :mod:`engine.vllm_hooks.flight`.
    """

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        *,
        eos_token_ids: list[int],
        hashes: PromptHashes,
        templates: Templates | None = None,
        private_ends: Sequence[int] = (),
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] | None = None,
        adapter: LaneAdapter | None = None,
        guests: Sequence[LaneAdapter] = (),
        number: int = 0,
        shelf: Shelf | None = None,
        vocabulary: Vocabulary | None = None,
        depth: int = 0,
    ) -> None:
        config = EngineArgs(**arguments).create_engine_config(usage_context=_USAGE)
        self.notes: list[str] = []
        """What who starts the lane should know, one line each."""
        if current_platform.is_cpu():
            changes, self.notes = processor.suited(name, arguments, config.model_config)
            if changes:
                config = EngineArgs(**arguments | changes).create_engine_config(usage_context=_USAGE)
        self._model_runner: str = arguments["additional_config"][SETTINGS_KEY]["model_runner"]
        runner.check_made(config, self._model_runner)
        executor = Executor.get_class(config)
        self._core = EngineCore(config, executor, log_stats=False, executor_fail_callback=on_failure)
        self._scheduler = cast("LaneScheduler", self._core.scheduler)
        self._hashes = hashes
        self._scheme = (self._scheduler.hash_block_size, config.cache_config.prefix_caching_hash_algo)
        self.lora = None if adapter is None else lora_request(adapter)
        self._in_process = issubclass(executor, UniProcExecutor)
        self._number = number
        self._shelf = shelf or Shelf()
        if self._in_process:
            self._worker.collm_shelf = self._shelf
            if vocabulary is not None:
                self._worker.collm_masses = MassReader(vocabulary, self._worker.device)
        # Waits for worker processes, so that the step loop can wait for several lanes at once. It never computes:
        # vLLM keeps its forward context in a module's global, so forward passes belong to the loop's thread.
        self._waiter = None if self._in_process else ThreadPoolExecutor(1, thread_name_prefix=f"lane-{name}")
        self._on_ready = on_ready
        self._templates = templates or Templates()
        backend = config.structured_outputs_config
        # Others are a user's own choice, checked and compiled by vLLM.
        self._reads_forms_itself = backend.backend == "guidance"
        self._any_whitespace = not backend.disable_any_whitespace
        words = (config.model_config.get_vocab_size() + 31) // 32
        if self._reads_forms_itself:
            manager = self._core.structured_output_manager
            manager._grammar_bitmask = torch.full((config.scheduler_config.max_num_seqs, words), -1, dtype=torch.int32)
        self._eos = eos_token_ids
        self._private_ends = [[end] for end in private_ends if end in eos_token_ids]
        self._vocab_size: int = arguments["additional_config"][SETTINGS_KEY]["vocab_size"]
        fixed = what_cannot_be_cut(self._scheduler.kv_cache_config)
        runner.check_state(fixed, self._model_runner)
        self._depth = min(depth, 1 if fixed is not None else 2) if self._in_process else 0
        if self._depth:
            self._worker.collm_is_asynchronous = True
            self._scheduler.runner_records = False
            self._scheduler.looks_ahead = self._depth > 1 and not config.model_config.logits_processors
        if fixed is not None:
            self.notes.append(f"{name}: run-ahead is off for all requests: state of kind {fixed} cannot be taken back")
        pool = self._scheduler.kv_cache_manager.block_pool
        self._info = LaneInfo(
            name,
            config.model_config.model,
            config.model_config.max_model_len,
            # One block is vLLM's null block, which holds nobody.
            kv_blocks=pool.num_gpu_blocks - 1,
            block_size=config.cache_config.block_size,
            can_cut=fixed is None,
            adapter=None if adapter is None else adapter.folder,
        )
        self._guests = {each.number: GuestLane(self, each.number, each.name, each) for each in guests}
        self.notes += memory_notes(self._info, len(self._guests))
        # Rows of guests: whose, and the request's id.
        self._guest_rows: dict[str, tuple[GuestLane, str]] = {}
        for lora in filter(None, (self.lora, *(guest.lora for guest in self._guests.values()))):
            # Now, not in the step of the first request that needs it; there is room for all, so none is ever dropped.
            self._core.add_lora(lora)
        # vLLM loads it for its grammars; None with skip_tokenizer_init.
        self._tokenizer = getattr(self._core.structured_output_manager, "tokenizer", None)
        self._forms = None if self._reads_forms_itself else VllmForms(config, self._tokenizer)
        self._stats = LaneStats(name)
        self._seconds: list[float] = []

    @property
    def info(self) -> LaneInfo:
        """Name, checkpoint and sizes."""
        return self._info

    @property
    def depth(self) -> int:
        """How many of its steps may be launched and not finished yet."""
        return self._depth

    @property
    def slow_dtype(self) -> str | None:
        """The data type that the weights are served in, if this processor computes it slowly."""
        dtype = self._core.vllm_config.model_config.dtype
        return str(dtype).removeprefix("torch.") if current_platform.is_cpu() and processor.is_slow(dtype) else None

    def form_setup(self) -> Setup | None:
        """What reading forms for this lane needs; None if it leaves them to vLLM."""
        if not self._reads_forms_itself or self._tokenizer is None:
            return None
        return setup_of(self._tokenizer, self._vocab_size, self._eos, any_whitespace=self._any_whitespace)

    def refusal(self, request: GenerationRequest) -> Refusal | None:
        """What vLLM itself has against the sampling parameters, or a token id that the model does not have."""
        for prompt in map(request.prompt_of, (self._number, *self._guests)):
            if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
                return Refusal(f"prompt has a token id outside [0, {self._vocab_size})")
        spec = request.sampling
        if spec.structured_outputs is not None:
            if spec.allowed_token_ids is not None or spec.bad_words:
                return Refusal("allowed_token_ids and bad_words cannot be combined with structured outputs")
            if not self._eos:
                return Refusal("structured outputs need a model with an end-of-text token")
        problem = self._complaint(spec)
        if problem is None:
            return None
        if spec.structured_outputs is not None and not self._reads_forms_itself:
            # vLLM looks at everything at once: what it does not mind without the grammar is the grammar's fault.
            without = self._complaint(msgspec.structs.replace(spec, structured_outputs=None))
            return Refusal(problem, ErrorCode.INVALID_GRAMMAR) if without is None else Refusal(without)
        return Refusal(problem)

    def add_voice(self, number: int, name: str) -> GuestLane:
        """A further lane for rows of the same model, which may have other prompts."""
        voice = self._guests[number] = GuestLane(self, number, name, None)
        return voice

    def guest_lanes(self) -> dict[int, GuestLane]:
        """The lanes of the adapters among its guests, by lane number."""
        return self._guests

    def apply(self, work: LaneWork) -> None:
        """Take in what changed."""
        self._tidy_shelf(self._number, work)
        self._take_in(work, self.lora, self._stats)

    def apply_for(self, guest: GuestLane, work: LaneWork) -> None:
        """Take in what changed for a guest."""
        self._tidy_shelf(guest.number, work)
        rows = LaneWork(
            [guest.row(request_id) for request_id in work.remove],
            [added._replace(request_id=guest.row(added.request_id)) for added in work.add],
            [msgspec.structs.replace(of, request_id=guest.row(of.request_id)) for of in work.extend],
        )
        for row in rows.remove:
            self._guest_rows.pop(row, None)
        self._guest_rows |= {guest.row(added.request_id): (guest, added.request_id) for added in work.add}
        guest.held.difference_update(work.remove)
        guest.held.update(added.request_id for added in work.add)
        self._take_in(rows, guest.lora, guest.counts)

    def _tidy_shelf(self, number: int, work: LaneWork) -> None:
        """What is written, and what is removed, is of no more use on the shelf."""
        if self._shelf.is_empty(number):
            return
        for request_id in work.remove:
            self._shelf.forget(number, request_id)
        for extension in work.extend:
            self._shelf.settle(number, extension.request_id, extension.final)

    def _take_in(self, work: LaneWork, lora: LoRARequest | None, stats: LaneStats) -> None:
        scheduler = self._scheduler
        if work.remove:
            scheduler.remove(work.remove)
            for request_id in work.remove:
                self._hashes.forget(request_id)
        for added in work.add:
            request = Request(
                added.request_id,
                added.prompt,
                sampling_params=self._sampling_params(added.sampling),
                pooling_params=None,
                lora_request=lora,
                block_hasher=self._block_hasher(lora),
                cache_salt=added.sampling.cache_salt,
                priority=added.order,
            )
            if self._reads_forms_itself and request.structured_output_request is not None:
                matcher = self._templates.matcher(self._owner(added.request_id)[1])
                request.structured_output_request.grammar = LaneGrammar(
                    matcher, added.sampling, self._eos, self._eos[0]
                )
            scheduler.add_lane_request(request, added, self._on_ready, looks_ahead=stats is self._stats)
            stats.catchup_tokens += 0 if added.scores else len(added.written)
        for extension in work.extend:
            stats.catchup_tokens += scheduler.extend(extension)

    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return self._scheduler.has_runnable()

    def is_preparing(self) -> bool:
        """Whether a grammar is being compiled."""
        return self._scheduler.is_compiling

    @property
    def starved(self) -> int | None:
        """The order of the first request that waits for the memory of parked rows; guests' rows among both."""
        return self._scheduler.starved

    def make_room(self) -> None:
        """Let the next step evict parked rows."""
        self._scheduler.make_room()

    def start(self) -> Future[LaneReport]:
        """Schedule and execute one step. In process it is done at once, or launched; workers complete it later."""
        begin = time.perf_counter()
        scheduler = self._scheduler
        failures = scheduler.settle_grammars()
        scheduled = scheduler.schedule()
        executor = self._core.model_executor
        forward = executor.execute_model(scheduled, non_block=True)
        # On the CPU, while a GPU computes.
        bitmask = scheduler.get_grammar_bitmask(scheduled)
        if bitmask is not None:
            failures += scheduler.mask_failures(bitmask.structured_output_request_ids)
        computed = self._count(scheduled)

        if self._waiter is None and not self._depth:
            future: Future[LaneReport] = Future()
            try:
                output = forward.result()
                if output is None:
                    output = executor.sample_tokens(bitmask)
                future.set_result(self._collect(scheduled, output, begin, failures, computed))
            except Exception as error:
                future.set_exception(error)
            return future
        # A step without tokens has nothing to sample.
        last = executor.sample_tokens(bitmask, non_block=True) if scheduled.total_num_scheduled_tokens else forward
        launched = time.perf_counter()

        def wait(begin: float) -> LaneReport:
            forward.result()
            return self._collect(scheduled, last.result(), begin, failures, computed)

        if self._waiter is not None:
            return self._waiter.submit(wait, begin)
        # Between launch and finish the thread does other things.
        return Launched(lambda: wait(time.perf_counter() - (launched - begin)))

    def flush(self) -> None:
        """An empty step, so that the workers forget the requests that were removed since the last one."""
        if self._scheduler.finished_req_ids:
            self._core.model_executor.execute_model(self._scheduler.schedule_nothing())
        self._stats.rows = 0

    def leftovers(self) -> list[str]:
        """What an idle lane still holds: requests, KV blocks, edits; in process the runner's own table too."""
        scheduler = self._scheduler
        found = [f"request {request_id}" for request_id in scheduler.requests]
        found += [f"bookkeeping {what}" for what in scheduler.bookkeeping()]
        found += [f"block hashes of {request_id}" for request_id in self._hashes.held()]
        pool = scheduler.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        found += [f"{held} KV blocks"] if held else []
        if self._in_process:
            found += [f"worker state of {request_id}" for request_id in self._worker.collm_held()]
        for number in (self._number, *self._guests):
            found += [f"distributions of {request_id}" for request_id in self._shelf.held(number)]
        return found

    def stats(self) -> LaneStats:
        """Counters and gauges."""
        seconds, self._seconds = self._seconds, []
        return msgspec.structs.replace(
            self._stats,
            step_seconds=seconds,
            preemptions=self._scheduler.num_preemptions,
            requests=len(self._scheduler.requests),
            kv_usage=self._scheduler.get_kv_cache_usage(),
        )

    def shutdown(self) -> None:
        """Stop the workers and free the device."""
        if self._waiter is not None:
            self._waiter.shutdown(wait=False, cancel_futures=True)
        self._core.shutdown()

    @property
    def _worker(self) -> Any:
        """In process only."""
        return self._core.model_executor.driver_worker.worker

    # -- inside -----------------------------------------------------------------------------------------------

    def _owner(self, row: str) -> tuple[GuestLane | None, str]:
        """The guest that a row is of, if it is one's, and the request's id."""
        return self._guest_rows.get(row) or (None, row)

    def _block_hasher(self, lora: LoRARequest | None) -> Callable[[Request], list[BlockHash]] | None:
        """Names blocks by their tokens, and by the adapter that they were computed with."""
        name = None if lora is None else lora.lora_name
        return self._hashes.shared(self._core.request_block_hasher, (*self._scheme, name))

    def _complaint(self, spec: SamplingSpec) -> str | None:
        try:
            params = self._sampling_params(spec)
        except (ValueError, VLLMValidationError) as error:
            return str(error)
        return runner.excess(params) if self._model_runner == "v2" else None

    def _sampling_params(self, spec: SamplingSpec) -> SamplingParams:
        follows = self._reads_forms_itself and spec.structured_outputs is not None
        params = SamplingParams(
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
            min_p=spec.min_p,
            seed=seed_of(spec),
            presence_penalty=spec.presence_penalty,
            frequency_penalty=spec.frequency_penalty,
            repetition_penalty=spec.repetition_penalty,
            logit_bias=spec.logit_bias,
            allowed_token_ids=None if spec.allowed_token_ids is None else list(spec.allowed_token_ids),
            logprobs=spec.logprobs,
            prompt_logprobs=spec.prompt_logprobs,
            stop_token_ids=list(spec.stop_token_ids),
            ignore_eos=spec.ignore_eos and not follows,
            # Stop rules are the collaborative scheduler's; the lane never ends a request by itself.
            max_tokens=self._info.max_model_len,
            # With a form the mask says where the answer may end.
            min_tokens=0 if follows else spec.min_tokens,
            detokenize=False,
            structured_outputs=self._form(spec.structured_outputs),
        )
        if spec.bad_words:
            # vLLM makes these from text with a tokenizer of its own; here they come as token ids.
            params._bad_words_token_ids = [list(word) for word in spec.bad_words]
        if self._eos:
            params.update_from_generation_config({"eos_token_id": self._eos}, self._eos[0])
        if spec.ignore_eos and self._private_ends:
            params._bad_words_token_ids = [*(params._bad_words_token_ids or []), *self._private_ends]
        config = self._core.vllm_config
        # All but the grammar, which has been looked at.
        params.verify(config.model_config, None, None, None)
        return params

    def _form(self, form: StructuredOutputs | None) -> StructuredOutputsParams | None:
        if form is None:
            return None
        if self._forms is None:
            return StructuredOutputsParams(json_object=True)  # only that there is a form; it comes with the request
        return self._forms.params(form)

    def _collect(
        self,
        scheduled: SchedulerOutput,
        output: ModelRunnerOutput,
        begin: float,
        failures: list[Failure],
        computed: list[Computed],
    ) -> LaneReport:
        readings: Readings = getattr(output, READINGS, _NO_READINGS)
        samples: list[Sample] = []
        guests: dict[int, list[Sample]] = {number: [] for number in self._guests}
        for request, position, token, row, asked in self._scheduler.collect(scheduled, output, readings.asked):
            spec = request.sampling_params
            assert spec is not None
            guest, request_id = self._owner(request.request_id)
            sample = Sample(request_id, position, token)
            # Readings of asked positions lie behind those of the rows' ends.
            reading = len(output.req_ids) + row if asked else row
            if readings.gate is not None and guest is None:
                sample.gate = readings.gate[reading]
            if readings.regret is not None and guest is None:
                sample.regret = readings.regret[reading]
            if readings.top_probability is not None:
                sample.top_probability = readings.top_probability[reading]
            if asked:
                sample.logprobs = row_logprobs(readings.asked_logprobs, row, spec.logprobs)
                sample.support = readings.asked_support.get(row)
            else:
                sample.logprobs = row_logprobs(output.logprobs, row, spec.logprobs)
                sample.support = readings.support.get(row)
                prompt = output.prompt_logprobs_dict.get(request.request_id)
                if prompt is not None:
                    sample.prompt_logprobs = prompt_logprobs(prompt)
            (samples if guest is None else guests[guest.number]).append(sample)
        self._stats.steps += 1
        self._stats.device_seconds += readings.device_seconds
        if self._guests:
            failures = [failure._replace(request_id=self._owner(failure.request_id)[1]) for failure in failures]
        seconds = time.perf_counter() - begin
        self._seconds.append(seconds)
        self._scheduler.speed.observe(scheduled.total_num_scheduled_tokens, readings.device_seconds or seconds)
        return LaneReport(
            samples,
            seconds,
            scheduled.total_num_scheduled_tokens,
            len(scheduled.num_scheduled_tokens),
            failures,
            guests,
            computed,
            readings.device_seconds,
        )

    def _count(self, scheduled: SchedulerOutput) -> list[Computed]:
        """Count a step's rows and tokens where they belong."""
        scheduler = self._scheduler
        computed = account(scheduled, scheduler.requests, self._guest_rows, self._number, scheduler.scoring)
        guests = {number: guest.counts for number, guest in self._guests.items()}
        caches = scheduler.kv_cache_manager.enable_caching
        count({self._number: self._stats, **guests}, computed, scheduled, scheduler.requests, caches=caches)
        for counts in guests.values():
            counts.steps += counts.rows > 0
        return computed

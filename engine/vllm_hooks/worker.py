"""The worker's side of a lane: gate values, token edits, samples before the end, and draws keyed by position.

Tensor shapes are suffixes: R rows that are sampled in a step, T tokens computed in it, A samples asked for before the
end of a row, D hidden size, V vocabulary, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput, SamplerOutput

from engine.config import RecordConfig
from engine.errors import ConfigError
from engine.gate import GateArtifact
from engine.lanes.shelf import Shelf
from engine.vllm_hooks import blend
from engine.vllm_hooks.device_clock import DeviceClock, events_of
from engine.vllm_hooks.isolation import OwnWorkspace, ensure_expert_group, graphs_kept
from engine.vllm_hooks.masses import MassReader
from engine.vllm_hooks.outputs import PendingOutput, Sampled
from engine.vllm_hooks.record import Recorder, row_of
from engine.vllm_hooks.sampling import KeyedSampler, metadata_of, on_device
from engine.vllm_hooks.shared_shelf import Layout, SharedShelf
from engine.vllm_hooks.wire import EDITS, SETTINGS_KEY, LaneEdits

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    _Worker: Any = object
else:
    _Worker = object


_FEW_RANGES = 4
"""As many ranges of columns are masked one by one."""

_RANKED_ROWS = 64
"""Rows whose tokens are ranked at once: comparing takes 8 bytes for each of their logits."""


class RowReader:
    """Stands between the model and the sampler: reads the gate off the rows that are about to be sampled.

    Args:
        compute_logits: the model's own, hidden_RD -> logits_RV (None on ranks that hold no logits).
        gate: None for a lane without a gate artifact.
        gate_in_head: the last row of the LM head is theta (reference format).
        vocab_size: columns that the gate's features are taken from.
        masked: ranges [begin, end) of columns that are masked, so that neither the reference format's gate nor padding
            nor a token that another member does not have can ever be sampled, and log-probabilities are those of the
            shared vocabulary.
        device: of the model.
    """

    def __init__(
        self,
        compute_logits: Callable[..., torch.Tensor | None],
        *,
        gate: GateArtifact | None,
        gate_in_head: bool,
        vocab_size: int,
        masked: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self._compute_logits = compute_logits
        self._gate = gate.function.to(device) if gate is not None else None
        self._gate_in_head = gate_in_head
        self._vocab_size = vocab_size
        # A few ranges are slices; special tokens here and there are one index.
        self._slices = [slice(begin, end) for begin, end in masked] if len(masked) <= _FEW_RANGES else []
        columns = [] if self._slices else [column for begin, end in masked for column in range(begin, end)]
        self._columns_N = torch.tensor(columns, device=device) if columns else None
        self._reading = False
        self._wants_top_probability = False
        self._asked = 0
        self._asked_AV: torch.Tensor | None = None
        self.recorder: Recorder | None = None
        self.recorded: tuple[torch.Tensor, torch.Tensor] | None = None
        self._gate_RK: torch.Tensor | None = None
        self._top_R: torch.Tensor | None = None

    def begin(self, top_probability: bool) -> None:
        """The next call of the model's ``compute_logits`` is for the rows to be sampled."""
        self._reading = True
        self._wants_top_probability = top_probability
        self._asked = 0
        self._gate_RK = self._top_R = self._asked_AV = None
        self.recorded = None

    def expect_asked(self, count: int) -> None:
        """As many of the last rows of that call are of asked positions: masked like all, kept, and not returned."""
        self._asked = count

    def __call__(self, hidden_RD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The model's ``compute_logits``, with the gate read and foreign columns masked."""
        logits_RV = self._compute_logits(hidden_RD, *args, **kwargs)
        # vLLM calls this a second time for prompt log-probabilities; those rows are ignored.
        reading, self._reading = self._reading, False
        if logits_RV is None:
            return None
        if reading and self._gate is not None:
            self._gate_RK = self._gate(hidden_RD, logits_RV[:, : self._vocab_size])
        if reading and self._gate_in_head:
            # A copy: the column is masked next.
            self._gate_RK = logits_RV[:, -1:].to(torch.float32, copy=True)
        if reading and self._asked and self.recorder is not None:
            asked_AV = logits_RV[-self._asked :, : self._vocab_size]
            self.recorded = hidden_RD[-self._asked :], self.recorder.features(asked_AV)
        for columns in self._slices:
            logits_RV[:, columns] = float("-inf")
        if self._columns_N is not None:
            logits_RV.index_fill_(-1, self._columns_N, float("-inf"))
        if reading and self._wants_top_probability:
            logits = logits_RV.float()
            self._top_R = torch.exp(logits.amax(-1) - torch.logsumexp(logits, -1))
        if reading and self._asked:
            self._asked_AV, logits_RV = logits_RV[-self._asked :], logits_RV[: -self._asked]
        return logits_RV

    @property
    def gate_RK(self) -> torch.Tensor | None:
        """Gate values read since :meth:`begin`, on the device: those of the asked positions are the last ones."""
        return self._gate_RK

    @property
    def asked_gate_AK(self) -> torch.Tensor | None:
        """Gate values of the asked positions, on the device."""
        return None if self._gate_RK is None else self._gate_RK[-self._asked :]

    def take_asked(self) -> torch.Tensor | None:
        """Logits of the asked positions, [A, V]; None if there are none, or on ranks that hold no logits."""
        asked_AV, self._asked_AV = self._asked_AV, None
        return asked_AV

    def take(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gate values [R, K] and top probabilities [R] read since :meth:`begin`, on the device.

        Those of the rows' ends come first, then those of the asked positions.
        """
        gate_RK, top_R = self._gate_RK, self._top_R
        self._gate_RK = self._top_R = None
        return gate_RK, top_R


def gather_logprobs(logprobs_RV: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
    """What vLLM's ``Sampler.gather_logprobs`` returns, without compiling anything.

    vLLM counts ranks with a ``torch.compile``d function, for the sake of memory. The first request for logprobs then
    waits for inductor inside a step of everybody's; on a CPU that takes a C++ compiler and a cache folder to load
    libraries from, and without either the step fails, and the engine with it. Here memory is saved by counting a few
    rows at a time.

    Args:
        logprobs_RV: of each row.
        num_logprobs: most probable tokens wanted of each row.
        token_ids: the token of each row whose logprob and rank is wanted; shape [R].
    """
    top_RN, top_ids_RN = torch.topk(logprobs_RV, num_logprobs, dim=-1)
    ids_R1 = token_ids.unsqueeze(-1)
    own_R1 = logprobs_RV.gather(-1, ids_R1)
    pairs = zip(logprobs_RV.split(_RANKED_ROWS), own_R1.split(_RANKED_ROWS), strict=True)
    return LogprobsTensors(
        torch.cat((ids_R1, top_ids_RN), dim=1).to(torch.int32),
        torch.cat((own_R1, top_RN), dim=1),
        torch.cat([(rows_RV >= rows_R1).sum(-1) for rows_RV, rows_R1 in pairs]),
    )


def score(logits_AV: torch.Tensor, given: dict[int, int], num_logprobs: int) -> SamplerOutput:
    """What a sampler would say of rows in which these tokens were drawn.

    Args:
        given: row -> token.
        num_logprobs: most probable tokens wanted of each row.
    """
    rows_G = torch.tensor(list(given), device=logits_AV.device)
    tokens_G = torch.tensor(list(given.values()), device=logits_AV.device)
    logprobs_GV = logits_AV[rows_G].log_softmax(dim=-1, dtype=torch.float32)
    tokens_G1 = tokens_G.to(torch.int32).unsqueeze(-1)
    return SamplerOutput(tokens_G1, gather_logprobs(logprobs_GV, num_logprobs, tokens_G))


def write_over(output: SamplerOutput, scored: SamplerOutput, rows: list[int]) -> None:
    """Put scored rows in the place of drawn ones; both have as many columns of log-probabilities."""
    assert output.logprobs_tensors is not None
    assert scored.logprobs_tensors is not None
    rows_G = torch.tensor(rows, device=output.sampled_token_ids.device)
    output.sampled_token_ids[rows_G] = scored.sampled_token_ids.to(output.sampled_token_ids.dtype)
    for drawn, of_given in zip(output.logprobs_tensors[:3], scored.logprobs_tensors[:3], strict=True):
        drawn[rows_G] = of_given.to(drawn.dtype)


def head_width(model: torch.nn.Module) -> int | None:
    """Width of the LM head's input; None where no layer says so. Tied heads are the embedding itself.

    Of a composed model (engine.composed) the anchor's head writes; the other members have heads of their own.
    """
    writer = getattr(model, "anchor", model)
    layers = [layer for layer in writer.modules() if isinstance(layer, VocabParallelEmbedding)]
    heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)] or layers
    return heads[-1].embedding_dim if heads else None


class LaneWorkerMixin(_Worker):
    """Mixed into vLLM's worker of the platform; see ``worker_cpu`` and ``worker_gpu``."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then put a :class:`RowReader` before its ``compute_logits``; see also ``gather_logprobs``."""
        ensure_expert_group(self.vllm_config.model_config.is_moe)
        super().load_model(**kwargs)
        settings = self.vllm_config.additional_config[SETTINGS_KEY]
        path = settings["gate_path"]
        model = self.model_runner.get_model()
        gate = GateArtifact.load(path) if path is not None else None
        width = head_width(model)
        if gate is not None and width is not None and gate.hidden_size != width:
            raise ConfigError(f"gate.path: the gate is for hidden size {gate.hidden_size}, the LM head reads {width}")
        self._collm_reader = RowReader(
            model.compute_logits,
            gate=gate,
            gate_in_head=settings["gate_in_head"],
            vocab_size=settings["vocab_size"],
            masked=settings["masked"],
            device=self.device,
        )
        # Whatever manager is in place was made by this worker, the last one to start.
        self._collm_workspace = OwnWorkspace()
        self._collm_clock = DeviceClock(events_of(self.device))
        self._collm_keyed: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._collm_batch: Any = None
        # A lane in the engine's own process puts the engine's shelf here.
        shared = settings["shelf"]
        self.collm_shelf = Shelf() if shared is None else SharedShelf(Layout(*shared))
        self.collm_is_asynchronous = False
        # What the last step has sampled: for its output, and for the input of rows that look ahead.
        self._collm_sampled: Sampled | None = None
        self._collm_last: Sampled | None = None
        self.collm_masses: MassReader | None = None
        model.compute_logits = self._collm_reader
        if settings["record"] is not None and self.rank == 0:
            if width is None:
                raise ConfigError(f"{type(model).__name__}: no layer says how wide the LM head's input is")
            self._collm_reader.recorder = Recorder(RecordConfig(**settings["record"]), width)
        runner = self.model_runner
        runner.sampler.gather_logprobs = gather_logprobs
        self._collm_sampler = KeyedSampler(runner.sampler.topk_topp_sampler)
        runner.sampler.topk_topp_sampler.forward = self._collm_sampler
        runner._prepare_inputs = partial(self._collm_prepare_inputs, runner._prepare_inputs)
        runner._model_forward = partial(self._collm_forward, runner._model_forward)
        runner._sample = partial(self._collm_sample, runner._sample)
        runner._bookkeeping_sync = partial(self._collm_take_down, runner._bookkeeping_sync)

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache; other lanes' CUDA graphs outlive vLLM's trial captures."""
        with graphs_kept():
            available: int = super().determine_available_memory()
        return available

    def compile_or_warm_up_model(self) -> Any:
        """Warm up; from here on the workspace is the lane's own."""
        result = super().compile_or_warm_up_model()
        self._collm_workspace.keep()
        return result

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """One forward pass, with the lane's edits applied when every scheduled request is in the batch."""
        self._collm_workspace.use()
        edits: LaneEdits = getattr(scheduler_output, EDITS)
        self._collm_new = [new.req_id for new in scheduler_output.scheduled_new_reqs]
        self._collm_edits = edits
        self._collm_chunks = scheduler_output.num_scheduled_tokens
        batch = self.model_runner.input_batch
        if batch is not self._collm_batch:
            # The runner builds its batch anew while it sizes the KV cache; hook the one that is in use. The hook
            # sits before the batch's metadata is made: logits processors look at the output tokens there.
            self._collm_batch = batch
            batch.refresh_metadata = partial(self._collm_refresh, batch.refresh_metadata)
            if self.collm_is_asynchronous:
                # Buffers for input are written again only when the device has read them.
                self.model_runner.prepare_inputs_event = events_of(self.device)()
        batch.prev_sampled_token_ids = batch.prev_req_id_to_index = None
        if edits.ahead:
            assert self._collm_last is not None
            index = self._collm_last.rows
            batch.prev_sampled_token_ids = self._collm_last.tokens_R1
            batch.prev_req_id_to_index = {request_id: index[request_id] for request_id in edits.ahead}
        self._collm_reader.begin(edits.top_probability)
        self._collm_clock.begin()
        output = super().execute_model(scheduler_output)
        self._collm_clock.stop()
        return output

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample; the readings ride back on vLLM's own output. That of an asynchronous lane is to be waited for."""
        self._collm_workspace.use()
        # None on pipeline stages that hold no logits.
        state = self.model_runner.execute_model_state
        asked = self._collm_sample_asked()
        blending = None
        if self._collm_edits.parts and state is not None and state.logits is not None:
            blending = self._collm_blend(self._collm_ends(), state.logits, lambda: self._collm_reader.gate_RK)
            if blending is not None:
                self.model_runner.execute_model_state = state._replace(logits=blending.logits_RV)
        output = super().sample_tokens(grammar_output)
        if not isinstance(output, ModelRunnerOutput) or not output.req_ids:
            return output
        sampled, self._collm_sampled = self._collm_sampled, None
        pending = PendingOutput(
            output,
            sampled,
            *self._collm_reader.take(),
            asked,
            blending,
            self._collm_clock.detach(),
            event=events_of(self.device)(),
        )
        return pending if self.collm_is_asynchronous else pending.get_output()

    def _collm_forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._collm_clock.start()
        return forward(*args, **kwargs)

    def _collm_sample(self, sample: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._collm_sampler.prepare(*self._collm_keyed)
        self._collm_clock.start()
        output = sample(*args, **kwargs)
        self._collm_clock.stop()
        return output

    def _collm_take_down(
        self,
        take_down: Callable[..., Any],
        scheduled: SchedulerOutput,
        output: SamplerOutput,
        logits: torch.Tensor | None,
        hidden_states: torch.Tensor,
        num_tokens: int,
    ) -> Any:
        """vLLM waits for the samples here and takes them down; an asynchronous lane only starts to copy them.

        What of them is written comes back with the lane's edits.
        """
        if not self.collm_is_asynchronous:
            return take_down(scheduled, output, logits, hidden_states, num_tokens)
        runner = self.model_runner
        batch = runner.input_batch
        rows = dict(batch.req_id_to_index)
        discarded = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        self._collm_last = Sampled(output.sampled_token_ids, output.logprobs_tensors, rows, discarded)
        self._collm_sampled = self._collm_last
        prompt = runner._get_prompt_logprobs_dict(hidden_states[:num_tokens], scheduled.num_scheduled_tokens)
        return {}, None, None, [], prompt, batch.req_ids.copy(), rows, []

    def _collm_prepare_inputs(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the LM head read the asked positions along with the ends of the rows, its weights once for all."""
        logits_indices, *others = prepare(*args, **kwargs)
        asked = self._collm_edits.asked
        if asked:
            begin = 0
            begins: dict[str, int] = {}
            for request_id in self.model_runner.input_batch.req_ids:
                begins[request_id] = begin
                begin += self._collm_chunks[request_id]
            rows = [begins[request_id] + index for request_id, indices in asked.items() for index in indices]
            self._collm_reader.expect_asked(len(rows))
            logits_indices = torch.cat(
                (logits_indices, on_device(rows, logits_indices.dtype, logits_indices.device)),
            )
        return logits_indices, *others

    def _collm_ends(self) -> list[blend.Place]:
        """The rows of requests with blends that are sampled at their end."""
        runner = self.model_runner
        places = []
        for row, request_id in enumerate(runner.input_batch.req_ids):
            part = self._collm_edits.parts.get(request_id)
            if part is None:
                continue
            state = runner.requests[request_id]
            if state.num_computed_tokens + self._collm_chunks[request_id] == state.num_tokens:
                places.append(blend.Place(row, len(state.output_token_ids), part))
        return places

    def _collm_blend(
        self, places: list[blend.Place], logits_RV: torch.Tensor, gate_RK: Callable[[], torch.Tensor | None]
    ) -> blend.Blending | None:
        """Lay down what others need, and blend what they have laid down."""
        if self.collm_masses is not None:
            self.collm_masses.lay_down(self.collm_shelf, places, logits_RV)
        # Of shards that all hold the logits one lays them down.
        if get_tensor_model_parallel_rank() == 0:
            blend.offer(self.collm_shelf, places, logits_RV, gate_RK)
        return blend.blended(self.collm_shelf, places, logits_RV)

    def _collm_sample_asked(self) -> tuple[SamplerOutput, blend.Blending | None] | None:
        """Sample the positions that were asked for before the end of a row, as if they were its end.

        Only requests without penalties, token biases and grammars ask for these, so no more is needed of vLLM's
        sampling than temperature, top_k and top_p.
        """
        logits_AV = self._collm_reader.take_asked()
        if logits_AV is None:
            return None
        self._collm_clock.start()
        runner = self.model_runner
        places: list[blend.Place] = []
        offsets = self._collm_edits.draw_offsets
        params: list[SamplingParams] = []
        rows: list[int] = []
        seeds: list[int] = []
        positions: list[int] = []
        given: dict[int, int] = {}
        records: list[int] = []
        for request_id, indices in self._collm_edits.asked.items():
            state = runner.requests[request_id]
            part = self._collm_edits.parts.get(request_id)
            for index in indices:
                position = state.num_computed_tokens + index + 1
                if part is not None:
                    places.append(blend.Place(len(params), position - state.num_prompt_tokens, part))
                if self._collm_reader.recorded is not None:
                    records.append(row_of(request_id, position))
                if request_id in self._collm_edits.scored:
                    given[len(params)] = state.output_token_ids[position - state.num_prompt_tokens]
                elif (seed := state.sampling_params.seed) is not None:
                    rows.append(len(params))
                    seeds.append(seed)
                    positions.append(position + offsets.get(request_id, 0))
                params.append(state.sampling_params)
        if (recorder := self._collm_reader.recorder) is not None and self._collm_reader.recorded is not None:
            recorder.write(records, *self._collm_reader.recorded)
        blending = self._collm_blend(places, logits_AV, lambda: self._collm_reader.asked_gate_AK)
        if blending is not None:
            logits_AV = blending.logits_RV
        metadata = metadata_of(params, logits_AV)
        # Before the sampler, which may change logits in place.
        scored = score(logits_AV, given, metadata.max_num_logprobs or 0) if given else None
        if scored is not None and len(given) == len(params):
            output = scored
        else:
            self._collm_sampler.prepare(rows, seeds, positions)
            output = runner.sampler(logits_AV, metadata)
            if scored is not None:
                write_over(output, scored, list(given))
        self._collm_clock.stop()
        return output, blending

    def _collm_refresh(self, refresh: Callable[[], None]) -> None:
        runner = self.model_runner
        batch = runner.input_batch
        for request_id in self._collm_new:
            # A row that sits out a step is added to the batch anew, prompt and all: copying a list takes as long as
            # the context is, an array next to nothing. int64, since prompt log-probabilities index with it.
            state = runner.requests[request_id]
            state.prompt_token_ids = np.asarray(state.prompt_token_ids, dtype=np.int64)
        for request_id, (start, tokens) in self._collm_edits.tokens.items():
            output = runner.requests[request_id].output_token_ids
            del output[start:]
            output.extend(tokens)
            row = batch.req_id_to_index[request_id]
            begin = batch.num_prompt_tokens[row] + start
            end = begin + len(tokens)
            batch.token_ids_cpu[row, begin:end] = tokens
            batch.is_token_ids[row, begin:end] = True
            batch.num_tokens_no_spec[row] = end
        rows, seeds, positions = [], [], []
        offsets = self._collm_edits.draw_offsets
        for row, request_id in enumerate(batch.req_ids):
            state = runner.requests[request_id]
            if (seed := state.sampling_params.seed) is not None:
                rows.append(row)
                seeds.append(seed)
                computed = state.num_computed_tokens + self._collm_chunks[request_id]
                positions.append(computed + offsets.get(request_id, 0))
        self._collm_keyed = (rows, seeds, positions)
        # What vLLM would draw from, and rewind where an unfinished chunk's sample is thrown away.
        batch.generators.clear()
        refresh()

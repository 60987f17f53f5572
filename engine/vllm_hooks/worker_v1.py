"""The worker's side of a lane on vLLM's V1 model runner.

The runner keeps its copy of all requests' tokens on the host, in a batch from which rows that sit out a step are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput

from engine.vllm_hooks import blend
from engine.vllm_hooks.device_clock import events_of
from engine.vllm_hooks.outputs import PendingOutput, Sampled
from engine.vllm_hooks.sampling import on_device
from engine.vllm_hooks.worker import LaneWorker, RowState

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class LaneWorkerV1(LaneWorker):
    """See :class:`engine.vllm_hooks.worker.LaneWorker`."""

    def collm_held(self) -> list[str]:
        """Requests that the runner knows."""
        return list(self.model_runner.requests)

    def _collm_attach(self, runner: Any) -> None:
        self._collm_keyed: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._collm_batch: Any = None
        # What the last step has sampled: for its output, and for the input of rows that look ahead.
        self._collm_sampled: Sampled | None = None
        self._collm_last: Sampled | None = None
        self._collm_use(runner.sampler)
        runner._prepare_inputs = partial(self._collm_prepare_inputs, runner._prepare_inputs)
        runner._model_forward = partial(self._collm_forward, runner._model_forward)
        runner._sample = partial(self._collm_sample, runner._sample)
        runner._bookkeeping_sync = partial(self._collm_take_down, runner._bookkeeping_sync)

    def _collm_begin(self, scheduled: SchedulerOutput) -> None:
        edits = self._collm_edits
        self._collm_new = [new.req_id for new in scheduled.scheduled_new_reqs]
        self._collm_chunks = scheduled.num_scheduled_tokens
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

    def _collm_row(self, request_id: str) -> RowState:
        state = self.model_runner.requests[request_id]
        return RowState(state.num_computed_tokens, state.num_prompt_tokens, state.sampling_params)

    def _collm_standing(self, positions: Sequence[tuple[str, int]]) -> torch.Tensor:
        requests = self.model_runner.requests
        tokens = []
        for request_id, position in positions:
            state = requests[request_id]
            tokens.append(state.output_token_ids[position - state.num_prompt_tokens])
        return torch.tensor(tokens, device=self.device)

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

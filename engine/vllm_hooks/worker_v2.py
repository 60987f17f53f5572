"""The worker's side of a lane on vLLM's V2 model runner.

Here a request keeps its slot, and its tokens lie on the device. The runner reads the tokens up to ``prefill_len`` from
its table, and samples where it has computed as many; beyond them it goes on with what it has sampled. So an edit is
made by saying that the text is a prompt as long as it really is: it costs a write of the tokens that differ, whatever
the length of the context. Where the runner's own sample was written, nothing is said at all.

Draws are keyed as on the V1 runner (:mod:`engine.vllm_hooks.sampling`), by vLLM's own kernel where there is Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import AsyncModelRunnerOutput, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from engine.vllm_hooks import blend
from engine.vllm_hooks.device_clock import events_of
from engine.vllm_hooks.outputs import PendingOutput
from engine.vllm_hooks.sampling import on_device
from engine.vllm_hooks.worker import LaneWorker, RowState

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput as RowsOutput


class LaneWorkerV2(LaneWorker):
    """See :class:`engine.vllm_hooks.worker.LaneWorker`."""

    def collm_held(self) -> list[str]:
        """Requests that the runner knows."""
        return list(self.model_runner.req_states.req_id_to_index)

    def _collm_attach(self, runner: Any) -> None:
        self._collm_params: dict[str, SamplingParams] = {}
        self._collm_batch: InputBatch | None = None
        self._collm_rows: dict[str, int] = {}
        self._collm_seeds: tuple[list[int], list[int]] = ([], [])
        self._collm_asked: tuple[SamplerOutput, blend.Blending | None] | None = None
        self._collm_blending: blend.Blending | None = None
        # The runner's own sampler knows its slots only: it samples the rows' ends.
        ends = runner.sampler
        self._collm_use(Sampler(ends.logprobs_mode, ends.use_fp64_gumbel))
        ends._sample_random = self._collm_draw
        self._collm_reader.blend_ends = self._collm_blend_ends
        runner.add_requests = partial(self._collm_add_requests, runner.add_requests)
        runner.sample = partial(self._collm_sample, runner.sample)
        timing = runner.step_timing
        timing.forward_start = partial(self._collm_forward, timing.forward_start)

    def _collm_begin(self, scheduled: SchedulerOutput) -> None:
        self._collm_asked = self._collm_blending = None

    def _collm_row(self, request_id: str) -> RowState:
        batch = self._collm_batch
        assert batch is not None
        row = self._collm_rows[request_id]
        prompt = self.model_runner.req_states.prompt_len.np[batch.idx_mapping_np[row]]
        return RowState(int(batch.num_computed_tokens_np[row]), int(prompt), self._collm_params[request_id])

    def _collm_standing(self, positions: Sequence[tuple[str, int]]) -> torch.Tensor:
        states = self.model_runner.req_states
        slots = [states.req_id_to_index[request_id] for request_id, _ in positions]
        slots_G = on_device(slots, torch.int64, self.device)
        positions_G = on_device([position for _, position in positions], torch.int64, self.device)
        tokens_G: torch.Tensor = states.all_token_ids.gpu[slots_G, positions_G].long()
        return tokens_G

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample; the readings ride back on vLLM's own output. That of an asynchronous lane is to be waited for."""
        self._collm_workspace.use()
        output = super().sample_tokens(grammar_output)
        if not isinstance(output, AsyncModelRunnerOutput):
            return output
        pending = CopiedOutput(
            output,
            *self._collm_reader.take(),
            self._collm_asked,
            self._collm_blending,
            self._collm_clock.detach(),
            event=events_of(self.device)(),
        )
        return pending if self.collm_is_asynchronous else pending.get_output()

    def _collm_add_requests(self, add: Callable[[Any], None], scheduled: SchedulerOutput) -> None:
        """Put the runner's copy of the tokens right, in one go with what it writes for new requests.

        Those bring all their tokens themselves, and so do requests that come back after a preemption.
        """
        new = {each.req_id: each.sampling_params for each in scheduled.scheduled_new_reqs}
        for request_id in scheduled.finished_req_ids:
            self._collm_params.pop(request_id, None)
        self._collm_params.update(new)
        states = self.model_runner.req_states
        penalties = self.model_runner.sampler.penalties_state
        cached = scheduled.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        edited = False
        for request_id, (start, tokens) in self._collm_edits.tokens.items():
            # A row that looks ahead goes on with its sample, which the runner has taken down; so it was the last time.
            if request_id in new or request_id in self._collm_edits.ahead:
                continue
            edited = True
            slot = states.req_id_to_index[request_id]
            begin = int(states.prompt_len.np[slot]) + start
            length = begin + len(tokens)
            states.all_token_ids.stage_write(slot, begin, tokens)
            states.total_len.stage_write_elem(slot, length)
            states.num_computed_tokens.stage_write_elem(slot, computed[request_id])
            states.prefill_len.np[slot] = length
            if penalties.use_penalty[slot]:
                # Counted anew before the next sample.
                penalties._new_penalties_reqs.append(slot)
        if edited and not new:
            # Once a step: the buffers of the last step may still be read.
            states.apply_staged_writes()
        add(scheduled)

    def _collm_forward(self, forward_start: Callable[[], None]) -> None:
        self._collm_clock.start()
        forward_start()

    def _collm_sample(
        self,
        sample: Callable[..., tuple[RowsOutput, torch.Tensor, torch.Tensor]],
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[RowsOutput, torch.Tensor, torch.Tensor]:
        """Let the LM head read the asked positions along with the ends of the rows, its weights once for all."""
        edits = self._collm_edits
        self._collm_batch = input_batch
        self._collm_rows = {request_id: row for row, request_id in enumerate(input_batch.req_ids)}
        if edits.asked:
            begins = input_batch.query_start_loc_np
            asked = [
                int(begins[self._collm_rows[request_id]]) + index
                for request_id, indices in edits.asked.items()
                for index in indices
            ]
            self._collm_reader.add_asked(hidden_states[on_device(asked, torch.int64, self.device)])
        positions = (input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens).tolist()
        for request_id, offset in edits.draw_offsets.items():
            positions[self._collm_rows[request_id]] += offset
        seeds = self.model_runner.sampler.sampling_states.seeds.np[input_batch.idx_mapping_np].tolist()
        self._collm_seeds = (seeds, positions)
        self._collm_clock.start()
        output = sample(hidden_states, input_batch, grammar_output)
        self._collm_clock.stop()
        self._collm_seeds = ([], [])
        self._collm_asked = self._collm_sample_asked()
        return output

    def _collm_draw(
        self,
        logits_RV: torch.Tensor,
        slots_R: torch.Tensor,
        slots: Any,
        pos_R: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
        use_fused_sampler: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In the place of ``Sampler._sample_random`` of vLLM: the same filters, noise as in any other lane.

        Args:
            logits_RV: penalties, biases and temperature are in them.
            slots_R: of the rows; ``slots`` on the host.
        """
        temperature = self.model_runner.sampler.sampling_states.temperature
        greedy = temperature.np[slots] == 0
        if greedy.all():
            return logits_RV.argmax(-1), logits_RV
        seeds, positions = self._collm_seeds
        self._collm_sampler.prepare(range(len(seeds)), seeds, positions)
        tokens_R, processed_RV = self._collm_sampler(logits_RV, {}, top_k, top_p)
        if greedy.any():
            tokens_R = torch.where(temperature.gpu[slots_R] == 0, logits_RV.argmax(-1), tokens_R)
        return tokens_R, logits_RV if processed_RV is None else processed_RV

    def _collm_blend_ends(self, logits_RV: torch.Tensor) -> torch.Tensor:
        if not self._collm_edits.parts:
            return logits_RV
        blending = self._collm_blend(self._collm_ends(), logits_RV, lambda: self._collm_reader.gate_RK)
        self._collm_blending = blending
        return logits_RV if blending is None else blending.logits_RV

    def _collm_ends(self) -> list[blend.Place]:
        """The rows of requests with blends that are sampled at their end."""
        batch = self._collm_batch
        assert batch is not None
        places = []
        for request_id, part in self._collm_edits.parts.items():
            row = self._collm_rows[request_id]
            length = int(batch.num_computed_tokens_np[row] + batch.num_scheduled_tokens[row])
            if length >= batch.prefill_len_np[row]:
                places.append(blend.Place(row, length - self._collm_row(request_id).prompt, part))
        return places


class CopiedOutput(PendingOutput):
    """A step's output that vLLM copies to the host on a stream of its own.

    Args:
        copied: vLLM's.
        others: see :class:`~engine.vllm_hooks.outputs.PendingOutput`.
    """

    def __init__(self, copied: AsyncOutput, *others: Any, event: Any) -> None:
        super().__init__(copied.model_runner_output, None, *others, event=event)
        self._copied = copied

    def get_output(self) -> Any:
        """vLLM's output, with the lane's readings; waits for the device."""
        self._copied.get_output()
        return super().get_output()

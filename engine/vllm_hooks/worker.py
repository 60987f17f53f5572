"""The worker's side of a lane, whichever of vLLM's model runners it has: gate values, asked positions, blends.

What depends on the runner (where its rows are, how its copy of their tokens is put right) is in ``worker_v1`` and
``worker_v2``.

Tensor shapes are suffixes: R rows that are sampled in a step, A samples asked for before the end of a row, G of these
those that are given, V vocabulary, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.sampler import Sampler

from engine.config import RecordConfig
from engine.errors import ConfigError
from engine.gate import GateArtifact
from engine.lanes.shelf import Shelf
from engine.regret import RegretArtifact
from engine.vllm_hooks import blend
from engine.vllm_hooks.device_clock import DeviceClock, events_of
from engine.vllm_hooks.isolation import OwnWorkspace, ensure_expert_group, graphs_kept
from engine.vllm_hooks.masses import MassReader
from engine.vllm_hooks.record import Recorder, row_of
from engine.vllm_hooks.rows import RowReader, head_width
from engine.vllm_hooks.sampling import KeyedSampler, metadata_of
from engine.vllm_hooks.scores import gather_logprobs, score, write_over
from engine.vllm_hooks.shared_shelf import Layout, SharedShelf
from engine.vllm_hooks.wire import EDITS, NO_EDITS, SETTINGS_KEY, LaneEdits

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    _Worker: Any = object
else:
    _Worker = object


class RowState(NamedTuple):
    """What a runner knows of a request that is in the step.

    Attributes:
        computed: number of tokens that were computed before the step.
        prompt: length of its prompt.
    """

    computed: int
    prompt: int
    params: SamplingParams


class LaneWorker(_Worker):
    """Mixed into vLLM's worker of the platform; see ``worker_cpu`` and ``worker_gpu``."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then put a :class:`RowReader` before its ``compute_logits``; see also ``gather_logprobs``."""
        ensure_expert_group(self.vllm_config.model_config.is_moe)
        super().load_model(**kwargs)
        settings = self.vllm_config.additional_config[SETTINGS_KEY]
        path = settings["gate_path"]
        model = self.model_runner.get_model()
        gate = GateArtifact.load(path) if path is not None else None
        regret = RegretArtifact.beside(path) if path is not None else None
        width = head_width(model)
        if gate is not None and width is not None and gate.hidden_size != width:
            raise ConfigError(f"gate.path: the gate is for hidden size {gate.hidden_size}, the LM head reads {width}")
        self._collm_reader = RowReader(
            model.compute_logits,
            gate=gate,
            regret=regret,
            gate_in_head=settings["gate_in_head"],
            vocab_size=settings["vocab_size"],
            masked=settings["masked"],
            device=self.device,
        )
        # Whatever manager is in place was made by this worker, the last one to start.
        self._collm_workspace = OwnWorkspace()
        self._collm_clock = DeviceClock(events_of(self.device))
        self._collm_edits: LaneEdits = NO_EDITS
        # A lane in the engine's own process puts the engine's shelf here.
        shared = settings["shelf"]
        self.collm_shelf = Shelf() if shared is None else SharedShelf(Layout(*shared))
        self.collm_is_asynchronous = False
        self.collm_masses: MassReader | None = None
        model.compute_logits = self._collm_reader
        if settings["record"] is not None and self.rank == 0:
            if width is None:
                raise ConfigError(f"{type(model).__name__}: no layer says how wide the LM head's input is")
            self._collm_reader.recorder = Recorder(RecordConfig(**settings["record"]), width)
        self._collm_attach(self.model_runner)

    def collm_held(self) -> list[str]:
        """Requests that the runner knows."""
        raise NotImplementedError

    def _collm_attach(self, runner: Any) -> None:
        """Put hooks into the runner."""
        raise NotImplementedError

    def _collm_begin(self, scheduled: SchedulerOutput) -> None:
        """A step begins; its edits are in place."""
        raise NotImplementedError

    def _collm_row(self, request_id: str) -> RowState:
        """Of a request that is in the step."""
        raise NotImplementedError

    def _collm_standing(self, positions: Sequence[tuple[str, int]]) -> torch.Tensor:
        """The tokens that stand at positions of requests, int64 on the device."""
        raise NotImplementedError

    def _collm_use(self, sampler: Sampler) -> None:
        """Sample asked positions with this sampler, and draw with noise keyed by position."""
        sampler.gather_logprobs = gather_logprobs
        self._collm_asked_sampler = sampler
        self._collm_sampler = KeyedSampler(sampler.topk_topp_sampler)
        sampler.topk_topp_sampler.forward = self._collm_sampler

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
        # vLLM warms kernels up with steps of its own.
        self._collm_edits = getattr(scheduler_output, EDITS, NO_EDITS)
        self._collm_begin(scheduler_output)
        self._collm_reader.begin(self._collm_edits.top_probability)
        self._collm_clock.begin()
        output = super().execute_model(scheduler_output)
        self._collm_clock.stop()
        return output

    def _collm_blend(
        self, places: list[blend.Place], logits_RV: torch.Tensor, gate_RK: Callable[[], torch.Tensor | None]
    ) -> blend.Blending | None:
        """Lay down what others need, and blend what they have laid down."""
        if self.collm_masses is not None:
            self.collm_masses.lay_down(self.collm_shelf, places, logits_RV)
        # Of shards that all hold the logits one lays them down.
        if get_tensor_model_parallel_rank() == 0:
            blend.offer(self.collm_shelf, places, logits_RV, gate_RK)
        blending = blend.blended(self.collm_shelf, places, logits_RV)
        if blending is not None and get_tensor_model_parallel_world_size() > 1:
            # The first shard's answer lets the engine empty the shelf. One that read it later would draw another token,
            # and go on from that.
            get_tp_group().barrier()
        return blending

    def _collm_sample_asked(self) -> tuple[SamplerOutput, blend.Blending | None] | None:
        """Sample the positions that were asked for before the end of a row, as if they were its end.

        Only requests without penalties, token biases and grammars ask for these, so no more is needed of vLLM's
        sampling than temperature, top_k and top_p.
        """
        logits_AV = self._collm_reader.take_asked()
        if logits_AV is None:
            return None
        self._collm_clock.start()
        places: list[blend.Place] = []
        offsets = self._collm_edits.draw_offsets
        params: list[SamplingParams] = []
        rows: list[int] = []
        seeds: list[int] = []
        positions: list[int] = []
        given: list[int] = []
        standing: list[tuple[str, int]] = []
        records: list[int] = []
        for request_id, indices in self._collm_edits.asked.items():
            state = self._collm_row(request_id)
            part = self._collm_edits.parts.get(request_id)
            for index in indices:
                position = state.computed + index + 1
                if part is not None:
                    places.append(blend.Place(len(params), position - state.prompt, part))
                if self._collm_reader.recorded is not None:
                    records.append(row_of(request_id, position))
                if request_id in self._collm_edits.scored:
                    given.append(len(params))
                    standing.append((request_id, position))
                elif (seed := state.params.seed) is not None:
                    rows.append(len(params))
                    seeds.append(seed)
                    positions.append(position + offsets.get(request_id, 0))
                params.append(state.params)
        if (recorder := self._collm_reader.recorder) is not None and self._collm_reader.recorded is not None:
            recorder.write(records, *self._collm_reader.recorded)
        blending = self._collm_blend(places, logits_AV, lambda: self._collm_reader.asked_gate_AK)
        if blending is not None:
            logits_AV = blending.logits_RV
        metadata = metadata_of(params, logits_AV)
        scored = None
        if given:
            # Before the sampler, which may change logits in place.
            scored = score(logits_AV, given, self._collm_standing(standing), metadata.max_num_logprobs or 0)
        if scored is not None and len(given) == len(params):
            output = scored
        else:
            self._collm_sampler.prepare(rows, seeds, positions)
            output = self._collm_asked_sampler(logits_AV, metadata)
            if scored is not None:
                write_over(output, scored, given)
        self._collm_clock.stop()
        return output, blending

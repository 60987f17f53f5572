"""The lane's worker on CPU, for each of vLLM's model runners."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

import engine.vllm_hooks.kernels_cpu  # noqa: F401 - registers what the lane's options name, in worker processes too
from engine.vllm_hooks import lora_cpu
from engine.vllm_hooks.worker_v1 import LaneWorkerV1
from engine.vllm_hooks.worker_v2 import LaneWorkerV2


class _CpuWorker(CPUWorker):
    """vLLM's CPU worker, with LoRA layers that compute as in :mod:`engine.vllm_hooks.lora_cpu`, if it has any."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model."""
        type(current_platform).get_punica_wrapper = classmethod(lambda _: lora_cpu.NAME)
        super().load_model(**kwargs)
        lora_cpu.join_parts(self.model_runner.model)


class CpuLaneWorkerV1(LaneWorkerV1, _CpuWorker):
    """vLLM's CPU worker with its V1 model runner as part of a lane."""


class CpuLaneWorkerV2(LaneWorkerV2, _CpuWorker):
    """vLLM's CPU worker with its V2 model runner as part of a lane."""

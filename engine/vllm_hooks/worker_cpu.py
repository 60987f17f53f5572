"""The lane's worker on CPU."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

import engine.vllm_hooks.kernels_cpu  # noqa: F401 - registers what the lane's options name, in worker processes too
from engine.vllm_hooks import lora_cpu
from engine.vllm_hooks.worker import LaneWorkerMixin


class CpuLaneWorker(LaneWorkerMixin, CPUWorker):
    """vLLM's CPU worker as part of a lane."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model; its LoRA layers, if it has any, are to compute as in :mod:`engine.vllm_hooks.lora_cpu`."""
        type(current_platform).get_punica_wrapper = classmethod(lambda _: lora_cpu.NAME)
        super().load_model(**kwargs)
        lora_cpu.join_parts(self.model_runner.model)

"""The lane's worker on CPU."""

from vllm.v1.worker.cpu_worker import CPUWorker

import engine.vllm_hooks.kernels_cpu  # noqa: F401 - registers what the lane's options name, in worker processes too
from engine.vllm_hooks.worker import LaneWorkerMixin


class CpuLaneWorker(LaneWorkerMixin, CPUWorker):
    """vLLM's CPU worker as part of a lane."""

"""The lane's worker on CUDA devices."""

from vllm.v1.worker.gpu_worker import Worker

from engine.vllm_hooks.worker import LaneWorkerMixin


class GpuLaneWorker(LaneWorkerMixin, Worker):
    """vLLM's GPU worker as part of a lane."""

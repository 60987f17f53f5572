"""The lane's worker on CPU."""

from vllm.v1.worker.cpu_worker import CPUWorker

from engine.vllm_hooks.worker import LaneWorkerMixin


class CpuLaneWorker(LaneWorkerMixin, CPUWorker):
    """vLLM's CPU worker as part of a lane."""

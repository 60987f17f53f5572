"""The lane's worker on CUDA devices, for each of vLLM's model runners."""

from vllm.v1.worker.gpu_worker import Worker

from engine.vllm_hooks.worker_v1 import LaneWorkerV1
from engine.vllm_hooks.worker_v2 import LaneWorkerV2


class GpuLaneWorkerV1(LaneWorkerV1, Worker):
    """vLLM's GPU worker with its V1 model runner as part of a lane."""


class GpuLaneWorkerV2(LaneWorkerV2, Worker):
    """vLLM's GPU worker with its V2 model runner as part of a lane."""

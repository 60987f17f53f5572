"""What every contender is started with."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.shapes import Member, Pair
from bench.workload import GREEDY, Sampling

WORKING_BYTES = 4 << 30
"""What a lane needs on a GPU beside weights and KV cache."""


@dataclass(frozen=True)
class Settings:
    """What all contenders are started with.

    Attributes:
        max_num_seqs: most requests at once.
        request_tokens: of the longest request, prompt and answer together.
        scheduler: fields of the engine's ``SchedulerConfig``.
        vllm: engine options of vLLM under vLLM's names, for every engine.
        draft_tokens: how many tokens the base guesses at a time where it is the expert's draft model.
        sampling: how every token is drawn.
        two_devices: the engine's base computes on the first CUDA device and its expert on the second, in processes.
        cuda: whether there is a CUDA device; else all is on CPU.
        log: file that the servers' output goes to.
    """

    pair: Pair
    max_num_seqs: int
    request_tokens: int
    scheduler: dict[str, Any] = field(default_factory=dict)
    vllm: dict[str, Any] = field(default_factory=dict)
    draft_tokens: int = 4
    sampling: Sampling = GREEDY
    two_devices: bool = False
    cuda: bool = False
    log: Path | None = None

    @property
    def max_model_len(self) -> int:
        """Context in tokens: what is needed, in whole KiB as people would set it."""
        return min(-(-self.request_tokens // 1024) * 1024, self.pair.max_model_len)

    def kv_bytes(self, member: Member, draft: Member | None = None) -> int:
        """Size of a member's KV cache in bytes: all requests at once, and blocks that are not full; or one context.

        Args:
            draft: a model that drafts for it, and shares the cache.
        """
        tokens = max(self.max_num_seqs * (self.request_tokens + 64), self.max_model_len + 64)
        each = member.kv_bytes_per_token
        if draft is not None:
            # vLLM gives the layers of both blocks of one size, which is that of the larger ones.
            each += max(each, draft.kv_bytes_per_token)
        return max(tokens * each * 5 // 4, 32 << 20)

    def engine_options(self, member: Member, draft: Member | None = None) -> dict[str, Any]:
        """Engine options that this server's lane and a stock server of the same model have in common."""
        options: dict[str, Any] = {
            "dtype": self.pair.dtype,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": 8192 if self.cuda else 2048,
        }
        if self.cuda:
            weights = member.weights + (0 if draft is None else draft.weights)
            share = (weights + self.kv_bytes(member, draft) + WORKING_BYTES) / cuda_memory_bytes()
            options["gpu_memory_utilization"] = round(min(0.92, share), 3)
        else:
            options |= {"block_size": 32, "enforce_eager": True}
        return options | self.vllm


def cuda_memory_bytes() -> int:
    """Memory of the first CUDA device.

    Raises:
        BenchError: there is none.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"nvidia-smi: {error}") from error
    return int(output.split()[0]) << 20

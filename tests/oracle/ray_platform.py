"""vLLM's CPU platform with a place for its workers in Ray, by vLLM's own entry point for platforms.

On CPUs vLLM names no resource by which Ray could place workers. Here they take Ray's GPUs, which a node may claim to
have without having any: all else of the way through Ray is that of a machine with GPUs.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class CpuOnRay(CpuPlatform):
    ray_device_key = "GPU"


def register() -> str:
    return f"{__name__}.{CpuOnRay.__name__}"

"""vLLM's CPU platform with a place for its workers in Ray, by vLLM's own entry point for platforms.

On CPUs vLLM names no resource by which Ray could place workers. Here they take Ray's GPUs, which a node may claim to
have without having any: all else of the way through Ray is that of a machine with GPUs.
"""

from __future__ import annotations

import os
from pathlib import Path

from vllm.platforms.cpu import CpuPlatform

ROOT = Path(__file__).parents[2]


class CpuOnRay(CpuPlatform):
    ray_device_key = "GPU"


def register() -> str:
    return f"{__name__}.{CpuOnRay.__name__}"


def python_path(folder: Path) -> str:
    """PYTHONPATH for processes in which vLLM is to find this platform."""
    described = folder / "collm_tests_ray_platform-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: collm-tests-ray-platform\nVersion: 0\n")
    (described / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nray_on_cpu = tests.oracle.ray_platform:register\n"
    )
    return os.pathsep.join([str(folder), str(ROOT)])

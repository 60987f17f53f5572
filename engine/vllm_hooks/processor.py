"""What the processor of a CPU lane computes quickly."""

from __future__ import annotations

import platform

import torch


def vector_units() -> str:
    """The vector instructions that torch uses here, for people: "AVX2", or "AVX512, bfloat16"; "none" without."""
    units = torch.backends.cpu.get_cpu_capability()
    if units in ("DEFAULT", "NO AVX"):
        return "none"
    native = torch.cpu.get_capabilities()
    return f"{units}, bfloat16" if native.get("avx512_bf16") or native.get("amx_bf16") else units


def is_slow(dtype: torch.dtype) -> bool:
    """Whether matrix products in this type are computed without vector units, many times slower than in float32.

    On x86, oneDNN multiplies matrices of half precision with AVX-512, and falls back to reference code without. Other
    architectures are not judged.
    """
    return (
        dtype in (torch.bfloat16, torch.float16)
        and platform.machine() in ("x86_64", "AMD64")
        and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )

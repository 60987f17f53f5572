"""What the processor of a CPU lane computes quickly, and what of a lane's options must be otherwise there."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig


COMPUTED_WRONG = ("lfm2", "lfm2_moe")
"""Families that vLLM 0.32 computes otherwise on a CPU than transformers does, so that they write other texts."""


def vector_units() -> str:
    """The vector instructions that torch uses here, for people: "AVX2", or "AVX512, bfloat16"; "none" without."""
    units = torch.backends.cpu.get_cpu_capability()
    if units in ("DEFAULT", "NO AVX"):
        return "none"
    native = torch.cpu.get_capabilities()
    # A torch that keeps to AVX2 does not use them.
    has_bfloat16 = units.startswith("AVX512") and (native.get("avx512_bf16") or native.get("amx_bf16"))
    return f"{units}, bfloat16" if has_bfloat16 else units


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


def suited(name: str, arguments: Mapping[str, Any], model: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """What of vLLM's engine arguments must be otherwise for a model on this processor, and a line about each.

    Args:
        name: the lane's.
        model: as vLLM reads it with these arguments.

    Raises:
        ConfigError: the model would write wrong texts.
    """
    family = model.hf_text_config.model_type
    if family in COMPUTED_WRONG:
        raise ConfigError(
            f"{name}.model: vLLM computes models of the family {family} wrongly on a CPU; they need a GPU"
        )
    changes: dict[str, Any] = {}
    notes = []
    if model.has_inner_state and arguments["enable_prefix_caching"]:
        # vLLM's CPU back end dies when a prompt's recurrent state is to be cached in small blocks.
        changes["enable_prefix_caching"] = False
        notes.append(f"{name}: no prefix caching: the model has recurrent state, and computes on a CPU")
    if arguments.get("dtype", "auto") == "auto" and model.quantization is None and is_slow(model.dtype):
        changes["dtype"] = "float32"
        saved = str(model.dtype).removeprefix("torch.")
        notes.append(
            f"{name}: computes in float32, many times faster than {saved} on this processor "
            f"({vector_units()}); its weights take twice the memory"
        )
    return changes, notes

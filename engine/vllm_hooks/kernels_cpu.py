"""Normalisation by vLLM's compiled CPU kernels instead of a chain of torch operations.

vLLM builds these kernels for CPUs too, but its registry of implementations offers them on GPUs only: on a CPU a layer's
two normalisations are some 20 small torch calls, a fifth of a small model's forward pass. They are registered here the
way vLLM's own are, under a provider of their own. For eager lanes: a compiler fuses the chain better.
"""

from __future__ import annotations

import torch
from vllm import ir
from vllm.platforms import current_platform

current_platform.import_kernels()

PROVIDER = "collm_cpu"
COMPILED_OPS = ("rms_norm", "fused_add_rms_norm")
"""vLLM's names of the operations that the provider has."""


def _takes(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """What the kernel can do: normalise whole rows, in the type of their weights."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


def _takes_sum(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _takes(x, weight, epsilon, variance_size) and x_residual.is_contiguous()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    """x divided by the root of its rows' mean squares, times the weight; shapes [..., D] and [D]."""
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of both normalised as by :func:`rms_norm`, and the sum; in place."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)(rms_norm)
ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_sum, inplace=True)(fused_add_rms_norm)

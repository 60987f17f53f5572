"""Normalisation by vLLM's compiled CPU kernels instead of a chain of torch operations.

vLLM builds these kernels for CPUs too, but its registry of implementations offers them on GPUs only: on a CPU a layer's
two normalisations are some 20 small torch calls, a fifth of a small model's forward pass. They are registered here the
way vLLM's own are, under a provider of their own. For eager lanes: a compiler fuses the chain better.

The kernels are built from the vector instructions of the processor, and what they compute depends on these: without
AVX-512 they truncate bfloat16 where torch rounds, and refuse rows that do not fill their vectors. So each data type and
row width is tried once, when a lane first meets it, and left to vLLM's own implementation where the kernels differ.
"""

from __future__ import annotations

import functools

import torch
from vllm import ir
from vllm.platforms import current_platform

current_platform.import_kernels()

PROVIDER = "collm_cpu"
COMPILED_OPS = ("rms_norm", "fused_add_rms_norm")
"""vLLM's names of the operations that the provider has."""

_TRIED_ROWS = 4
_EPSILON = 1e-6


def _takes(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """What the kernel can do: normalise whole rows, in the type of their weights, as exactly as torch does."""
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.is_contiguous()
        and is_exact(x.dtype, x.shape[-1])
    )


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


@functools.cache
def is_exact(dtype: torch.dtype, width: int) -> bool:
    """Whether the compiled kernels round as torch does on this processor; they are tried on a few rows.

    The residual sum has to be torch's own, bit for bit. The norm has to be the exact one rounded once (vLLM's native
    implementation rounds it twice).

    Args:
        dtype: of the rows and of the weight.
        width: elements per row.
    """
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(_TRIED_ROWS, width, generator=generator).to(dtype) for _ in range(2))
    weight = (torch.rand(width, generator=generator) + 0.5).to(dtype)
    total = x + residual
    try:
        norm = rms_norm(x, weight, _EPSILON)
        sum_norm, sum_ = fused_add_rms_norm(x.clone(), residual.clone(), weight, _EPSILON)
    except RuntimeError:
        return False  # rows of this width or type are not supported
    return torch.equal(sum_, total) and _rounds_once(norm, x, weight) and _rounds_once(sum_norm, total, weight)


def _rounds_once(norm: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    rows = x.double()
    exact = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + _EPSILON) * weight.double()
    # Half a unit in the last place for the rounding itself, the rest for sums and roots in float32.
    unit = torch.finfo(norm.dtype).eps
    slack = 0.1 * unit + 8 * torch.finfo(torch.float32).eps
    return torch.allclose(norm.double(), exact, rtol=0.5 * unit + slack, atol=torch.finfo(norm.dtype).tiny)


ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)(rms_norm)
ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_sum, inplace=True)(fused_add_rms_norm)

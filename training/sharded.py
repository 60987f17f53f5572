"""A base whose weights, gradients and optimizer states are sharded over processes: PyTorch's FSDP2 (``fully_shard``).

Only the main process reads the checkpoint, into its host's memory; the others get their shards from it. In a reduced
precision, what is computed is, and what learns is kept in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from training.errors import ModelError
from training.processes import Processes

CHECKPOINTS = "checkpoints"
"""Folder of sharded checkpoints, each a folder with its step's number as name."""
_COMPLETE = ".metadata"
"""What ``torch.distributed.checkpoint`` writes last."""


def shard(
    skeleton: torch.nn.Module,
    whole: torch.nn.Module | None,
    model: Callable[[torch.nn.Module], PreTrainedModel],
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh,
) -> None:
    """Shard a module in place, each of its layers by itself.

    Args:
        skeleton: the module without memory (on the device "meta"), which becomes the sharded one.
        whole: the same with its values, on the CPU; None in all processes but the main one.
        model: the transformers model in the module: itself, or what adapters are put around.
        dtype: what forward and backward pass compute in.
        device: this process's.
        mesh: all processes in one row.

    Raises:
        ModelError: the checkpoint has other weights than its configuration says.
    """
    inner = model(skeleton)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = set(inner._no_split_modules or ())
    for module in list(inner.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(inner, mesh=mesh, mp_policy=policy)
    for module in inner.modules():
        if isinstance(module, FSDPModule):
            # The parts of a loss are summed, so their gradients are too. Sums are what every backend has.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    skeleton.to_empty(device=device)
    values = {} if whole is None else dict(whole.named_parameters()) | dict(whole.named_buffers())
    named = dict(skeleton.named_parameters()) | dict(skeleton.named_buffers())
    if whole is not None and values.keys() != named.keys():
        differ = sorted(values.keys() ^ named.keys())
        raise ModelError(f"{inner.name_or_path}: cannot be sharded: its configuration does not say {differ[0]}")
    for name, target in named.items():
        if whole is not None:
            full = values[name].detach().to(device, target.dtype)
        else:
            full = torch.empty(target.shape, dtype=target.dtype, device=device)
        put(target, full)


def put(target: torch.Tensor, full: torch.Tensor) -> None:
    """Give a tensor, sharded or not, the main process's values; the other processes' ``full`` only has their shape."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
        else:
            dist.broadcast(full, src=0)
            target.copy_(full)


def take(target: torch.Tensor, full: torch.Tensor) -> None:
    """Give a tensor, sharded or not, values that all processes have the whole of."""
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    with torch.no_grad():
        target.copy_(full)


def gathered(parameters: Mapping[str, torch.Tensor], processes: Processes) -> dict[str, torch.Tensor]:
    """The whole of parameters on the CPU of the main process, one gathered after the other; nothing in the others."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if processes.main:
            found[name] = full.detach().cpu()
    return found


def latest(folder: Path) -> int | None:
    """The step of the last sharded checkpoint that is complete; None if there is none."""
    steps = [int(each.parent.name) for each in (folder / CHECKPOINTS).glob(f"*/{_COMPLETE}")]
    return max(steps, default=None)


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], processes: Processes) -> None:
    """Write a sharded checkpoint, each process its own part. Earlier ones are removed when it is complete."""
    here = folder / CHECKPOINTS / str(step)
    checkpoint.state_dict_saver.save(dict(tensors), checkpoint_id=here, no_dist=not dist.is_initialized())
    if processes.main:
        for other in here.parent.iterdir():
            if other != here:
                shutil.rmtree(other)


def load(folder: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read a sharded checkpoint into tensors, sharded or not, whatever number of processes wrote it."""
    checkpoint.state_dict_loader.load(
        dict(tensors), checkpoint_id=folder / CHECKPOINTS / str(step), no_dist=not dist.is_initialized()
    )


def remove(folder: Path) -> None:
    """Remove the sharded checkpoints."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

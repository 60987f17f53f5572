"""The processes that train one base together, as ``torchrun`` starts them; mostly there is one.

Each process runs the same stage. The main one (rank 0) alone writes to ``out`` and to the terminal, except for what is
sharded (:mod:`training.sharded`), of which each writes its own part.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from training import launcher
from training.errors import SettingsError

_LONGEST_WAIT = datetime.timedelta(hours=2)
"""For a process that does alone what the others wait for, such as writing a large base."""


@dataclass(frozen=True)
class Processes:
    """This process, its number, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def from_main(self, value: int) -> int:
        """The main process's value, in all of them."""
        return int(self.sum(value if self.main else 0))

    def sum(self, value: float) -> float:
        """The sum of all processes' values, in all of them."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device(dist.get_backend()))
        dist.all_reduce(total)
        return float(total)

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Add up the gradients of what each process has the whole of; those of sharded parameters are sums already."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                dist.all_reduce(parameter.grad)


ALONE = Processes()


def started_by_launcher(environment: Mapping[str, str] = os.environ) -> Processes:
    """What a launcher says in the environment, without starting anything.

    Raises:
        SettingsError: a launcher told only a part of it, or something that is no number.
    """
    count = launcher.world_size(environment)
    if count == 1:
        return ALONE
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise SettingsError(f"WORLD_SIZE is {count}, but {name} is not set: start the processes with torchrun")
    return Processes(launcher.rank(environment), count)


@cache
def start_processes(device: torch.device) -> Processes:
    """Connect the processes that a launcher started. The connection lasts as long as they do.

    Raises:
        SettingsError: all processes of a machine are to have one GPU.
    """
    found = started_by_launcher()
    if found.count > 1:
        if device.type == "cuda" and device.index != int(os.environ["LOCAL_RANK"]):
            raise SettingsError(f"compute.device: {device}: each process has a GPU of its own: leave its number out")
        _connect(device)
    return found


@cache
def start_mesh(device: torch.device) -> DeviceMesh:
    """All processes in one row, over which weights are sharded; also where there is one process."""
    if not dist.is_initialized():
        _connect(device)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def _connect(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        # Of a tensor, since "cuda" alone has no number.
        torch.cuda.set_device(torch.empty(0, device=device).device)
    if started_by_launcher().count > 1:
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _device(backend: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")

"""Keeps lanes in one process apart where vLLM has one of something per process.

vLLM expects to be alone: its workspace manager, its expert-parallel group and the register of its CUDA graphs are
globals of a module or a class, and an engine that starts replaces, lacks or clears what another one uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.distributed import parallel_state
from vllm.v1.worker import workspace


class OwnWorkspace:
    """A lane's workspace manager: captured CUDA graphs hold addresses in its buffers, so it must live on."""

    def __init__(self) -> None:
        self._manager = workspace._manager

    def keep(self) -> None:
        """Call when the lane has started, whichever manager it has made meanwhile."""
        self._manager = workspace._manager

    def use(self) -> None:
        """Call before each of the lane's steps."""
        workspace._manager = self._manager


@contextmanager
def graphs_kept() -> Iterator[None]:
    """Put the CUDA graphs of all lanes back that vLLM clears inside: it means its own, and clears the process's."""
    before: list[tuple[Any, dict[Any, Any]]] = [
        (wrapper, dict(wrapper.concrete_cudagraph_entries))
        for kind in (CUDAGraphWrapper, BreakableCUDAGraphWrapper)
        for wrapper in list(kind._all_instances)
    ]
    try:
        yield
    finally:
        for wrapper, entries in before:
            for key, entry in entries.items():
                wrapper.concrete_cudagraph_entries.setdefault(key, entry)


def ensure_expert_group(is_moe: bool, init: Callable[..., Any] | None = None) -> None:
    """Make the expert-parallel group for a mixture of experts that starts after a dense model in the same process.

    vLLM makes it together with the other groups, and only if the model that comes first needs it.

    Args:
        init: makes a group; a parameter for tests.
    """
    if not is_moe or parallel_state._EP is not None:
        return
    world = parallel_state.get_world_group()
    make = init or parallel_state.init_model_parallel_group
    parallel_state._EP = make(
        [list(range(world.world_size))],
        world.local_rank,
        torch.distributed.get_backend(world.device_group),
        group_name="ep",
    )

"""Adapters of a lane's model, and other prompts for it, as lanes of their own; their rows are computed in its steps."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec
from vllm.lora.request import LoRARequest

from engine.lanes.interface import LaneReport, LaneWork, Refusal
from engine.stats import LaneStats
from engine.types import GenerationRequest, LaneInfo
from engine.vllm_hooks.adapters import LaneAdapter

if TYPE_CHECKING:
    from engine.grammar.worker import Setup
    from engine.vllm_hooks.lane import VllmLane


def lora_request(adapter: LaneAdapter) -> LoRARequest:
    """An adapter as vLLM names it; blocks of its prefix cache are named by it too."""
    return LoRARequest(adapter.name, adapter.number + 1, adapter.folder)


class GuestLane:
    """Another lane's model with an adapter, or with another prompt. See :class:`engine.lanes.interface.Lane`.

    Args:
        host: holds the weights and computes.
        adapter: None is the model as the host's own rows have it.
    """

    def __init__(self, host: VllmLane, number: int, name: str, adapter: LaneAdapter | None) -> None:
        self._host = host
        self.number = number
        self.lora = host.lora if adapter is None else lora_request(adapter)
        self.counts = LaneStats(name)
        folder = host.info.adapter if adapter is None else adapter.folder
        self._info = msgspec.structs.replace(host.info, name=name, adapter=folder)
        self.held: set[str] = set()
        """Requests that the lane was told of."""

    @property
    def info(self) -> LaneInfo:
        """The host's sizes: its KV blocks serve both."""
        return self._info

    @property
    def depth(self) -> int:
        """The host's steps."""
        return 0

    def row(self, request_id: str) -> str:
        """The name of its row in the host, which no request of a client can have."""
        return f"{request_id}\0{self.number}"

    def refusal(self, request: GenerationRequest) -> Refusal | None:
        """The host's, which is asked itself."""
        return None

    def form_setup(self) -> Setup | None:
        """The host's."""
        return self._host.form_setup()

    def apply(self, work: LaneWork) -> None:
        """Take in what changed."""
        self._host.apply_for(self, work)

    def has_work(self) -> bool:
        """The host has it."""
        return False

    def is_preparing(self) -> bool:
        """The host prepares."""
        return False

    @property
    def starved(self) -> int | None:
        """The host's rows and its own share one memory, and it is the host that tells."""
        return None

    def make_room(self) -> None:
        """The host does."""

    def start(self) -> Future[LaneReport]:
        """Not a lane that steps.

        Raises:
            RuntimeError: always; the host's reports have its samples.
        """
        raise RuntimeError(f"lane {self._info.name} computes in the steps of lane {self._host.info.name}")

    def flush(self) -> None:
        """The host does."""
        self.counts.rows = 0

    def leftovers(self) -> list[str]:
        """What an idle lane still holds; the rows themselves are the host's to name."""
        return [f"request {request_id}" for request_id in sorted(self.held)]

    def stats(self) -> LaneStats:
        """Its own counters. Step times, preemptions and KV blocks are the host's."""
        return msgspec.structs.replace(self.counts, requests=len(self.held))

    def shutdown(self) -> None:
        """The host does."""

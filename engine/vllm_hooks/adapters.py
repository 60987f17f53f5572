"""The adapters that a vLLM engine holds. Must not import vLLM: a pair is checked before that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.adapters import Adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""


@dataclass(frozen=True)
class LaneAdapter:
    """An adapter that an engine holds.

    Attributes:
        number: of the lane that writes with it.
        name: the lane's name.
    """

    number: int
    name: str
    adapter: Adapter

    @property
    def folder(self) -> str:
        """Where it lies."""
        return str(self.adapter.directory)


def lora_arguments(adapters: Sequence[LaneAdapter]) -> dict[str, Any]:
    """vLLM's engine arguments for an engine that holds these adapters, all of them all the time."""
    if not adapters:
        return {}
    largest = max(each.adapter.rank for each in adapters)
    return {
        "enable_lora": True,
        "max_loras": len(adapters),
        "max_cpu_loras": len(adapters),
        "max_lora_rank": next(rank for rank in RANKS if rank >= largest),
        # Layers that none of them adapts stay as they are.
        "lora_target_modules": sorted({layer for each in adapters for layer in each.adapter.layers}),
    }

"""What a lane's KV cache can take back. A cut turns the count of computed tokens back and overwrites what lies beyond.

That is right where each token has a place of its own. A state that holds only its last value (Mamba, linear attention,
short convolutions) still contains the drafts after a cut. A sliding window gives up blocks by the computed length,
drafts included, and after a cut would miss some at its far end.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    HiddenStateCacheSpec,
    KVCacheConfig,
    RSWASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from engine.types import MOST_DRAFTS


def what_cannot_be_cut(config: KVCacheConfig) -> str | None:
    """The kind of a layer whose state cannot be taken back, in vLLM's words; None if all can."""
    for group in config.kv_cache_groups:
        spec: Any = group.kv_cache_spec
        parts = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
        for part in parts:
            positional = isinstance(part, FullAttentionSpec | SlidingWindowSpec)
            if not positional or isinstance(part, RSWASpec | HiddenStateCacheSpec):
                return type(part).__name__.removesuffix("Spec")
    return None


def keep_windows_for_cuts(coordinator: Any) -> None:
    """Let sliding windows keep the blocks that the longest cut may bring back into them."""
    for manager in coordinator.single_type_managers:
        if isinstance(manager.kv_cache_spec, SlidingWindowSpec):
            # Drafts, the token behind them, and one that the lane looks ahead.
            manager.extra_retained_tokens += MOST_DRAFTS + 2

"""The cross-attention between members, as a layer of vLLM.

Its keys and values come from an augmenting model's states at the positions of the tokens that are computed. So they
live in a KV cache like any self-attention's, one entry for each token, and everything that vLLM and this engine do with
such a cache (pages, chunks, prefixes, preemption, cut and extend) holds for them too.

Shapes: T tokens, D the anchor's hidden size, A the augmenting model's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from engine.composed.artifact import EPSILON, Heads


class CrossAttention(nn.Module):
    """One connection. The paper's f is folded into the weights of keys and values.

    Args:
        cache_config: vLLM's.
        prefix: full name of the module; its only number is the connection's.
    """

    def __init__(self, form: Heads, anchor_size: int, augmenting_size: int, cache_config: Any, prefix: str) -> None:
        super().__init__()
        shards = get_tensor_model_parallel_world_size()
        read = form.kv_heads * form.head_size

        def split(name: str, inputs: int, outputs: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(inputs, outputs, bias=False, return_bias=False, prefix=f"{prefix}.{name}")

        self.query = split("query", anchor_size, form.heads * form.head_size)
        self.key = split("key", augmenting_size, read)
        self.value = split("value", augmenting_size, read)
        self.output = RowParallelLinear(
            form.heads * form.head_size, anchor_size, bias=False, return_bias=False, prefix=f"{prefix}.output"
        )
        self.attn = Attention(
            form.heads // shards,
            form.head_size,
            form.head_size**-0.5,
            num_kv_heads=form.kv_heads // shards,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
        )
        self._normalize = form.normalize

    def forward(self, anchor_TD: torch.Tensor, augmenting_TA: torch.Tensor) -> torch.Tensor:
        """What is added to the anchor's states [T, D]."""
        if self._normalize:
            anchor_TD, augmenting_TA = _normalized(anchor_TD), _normalized(augmenting_TA)
        mixed = self.attn(self.query(anchor_TD), self.key(augmenting_TA), self.value(augmenting_TA))
        added_TD: torch.Tensor = self.output(mixed)
        return added_TD


def _normalized(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, (states.shape[-1],), eps=EPSILON)

"""LoRA layers on a CPU: rows of one batch that have different adapters, or none.

vLLM's own wrapper for CPUs copies an adapter's matrices once for every token, and takes a token without an adapter to
the last one's slot, to which it then applies whatever lies there. Here the tokens of a step are sorted by adapter
once, and each layer multiplies each adapter's tokens together; others are not touched.

A layer may have several adapted parts side by side (queries, keys and values), each with matrices of its own. In small
models the number of products costs more than what they compute, so the parts' matrices are kept as one: their A
below each other, their B along a diagonal.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

NAME = f"{__name__}.GroupedLora"
"""As vLLM's platforms name a wrapper."""


class Joined(tuple[torch.Tensor, ...]):
    """The matrices of a layer's parts as vLLM knows them, which are views of one tensor.

    Attributes:
        whole: [S, R, D] for A and [S, R, O] for B: slots for adapters, ranks of all parts, the layer's input and
            output.
    """

    whole: torch.Tensor

    @classmethod
    def of(cls, whole: torch.Tensor, parts: list[torch.Tensor], before: tuple[torch.Tensor, ...]) -> Joined:
        """Views ``parts`` of ``whole``, with what the tensors ``before`` hold."""
        for part, held in zip(parts, before, strict=True):
            part.copy_(held)
        joined = cls(parts)
        joined.whole = whole
        return joined


def join_parts(model: torch.nn.Module) -> None:
    """Replace the matrices of all adapted linear layers of a model by views of one tensor for each of A and B."""
    for layer in model.modules():
        if isinstance(layer, BaseLinearLayerWithLoRA):
            layer.lora_a_stacked, layer.lora_b_stacked = joined(layer.lora_a_stacked, layer.lora_b_stacked)


def joined(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> tuple[Joined, Joined]:
    """Matrices A [S, 1, r, D] and B [S, 1, O, r] of a layer's parts as parts of one A and one B."""
    slots, _, _, width = a[0].shape
    ranks, outputs = [part.shape[2] for part in a], [part.shape[2] for part in b]
    whole_a_SRD = a[0].new_zeros(slots, sum(ranks), width)
    whole_b_SRO = b[0].new_zeros(slots, sum(ranks), sum(outputs))
    rows_a = [rows.unsqueeze(1) for rows in whole_a_SRD.split(ranks, dim=1)]
    blocks_b = [
        rows.split(outputs, dim=2)[number].transpose(1, 2).unsqueeze(1)
        for number, rows in enumerate(whole_b_SRO.split(ranks, dim=1))
    ]
    return Joined.of(whole_a_SRD, rows_a, a), Joined.of(whole_b_SRO, blocks_b, b)


class GroupedLora(PunicaWrapperCPU):
    """Sorts a step's tokens by adapter, then multiplies group by group.

    Shapes: T tokens, D width of a layer's input, O of its output, r rank, R of all parts, S slots for adapters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: list[tuple[int, slice | torch.Tensor]] = []

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any
    ) -> None:
        """Called by vLLM before a step in which any token's adapter differs from the step before.

        What vLLM keeps for kernels of its own is not made: adapted embeddings and LM heads are refused.

        Args:
            mapping: has the number of each token's adapter, 0 for none.
            lora_index_to_id: the number of each slot's adapter.
        """
        rows_of: dict[int, list[int]] = {}
        for token, adapter in enumerate(mapping.index_mapping):
            if adapter > 0:
                rows_of.setdefault(adapter, []).append(token)
        self._groups = []
        for adapter, rows in rows_of.items():
            together = rows[-1] - rows[0] + 1 == len(rows)
            group = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows)
            self._groups.append((lora_index_to_id.index(adapter), group))

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add x_TD A^T B to y_TO, each token with its own adapter's A and B.

        Args:
            lora_a_stacked, lora_b_stacked: as :func:`join_parts` left them.
            output_slices: the parts' widths, which B has too.
            buffer: not needed here.
        """
        x_TD, y_TO = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        a_SRD, b_SRO = cast(Joined, lora_a_stacked).whole, cast(Joined, lora_b_stacked).whole
        for slot, rows in self._groups:
            narrow_GR = torch.mm(x_TD[rows], a_SRD[slot].T)
            if isinstance(rows, slice):
                y_TO[rows].addmm_(narrow_GR, b_SRO[slot], alpha=scale)
            else:
                y_TO.index_add_(0, rows, torch.mm(narrow_GR, b_SRO[slot]), alpha=scale)

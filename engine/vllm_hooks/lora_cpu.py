"""LoRA layers on a CPU: rows of one batch that have different adapters, or none.

vLLM's own wrapper for CPUs copies an adapter's matrices once for every token, and takes a token without an adapter to
the last one's slot, to which it then applies whatever lies there. Here the tokens of a step are sorted by adapter
once, and each layer multiplies each adapter's tokens together; others are not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

NAME = f"{__name__}.GroupedLora"
"""As vLLM's platforms name a wrapper."""


class GroupedLora(PunicaWrapperCPU):
    """Sorts a step's tokens by adapter, then multiplies group by group.

    Shapes: T tokens, D width of a layer's input, O of its output, r rank, S slots for adapters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: list[tuple[int, slice | torch.Tensor]] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM before a step in which any token's adapter differs from the step before."""
        super().update_metadata(*args, **kwargs)
        slots_T = self.token_lora_indices
        self._groups = []
        for slot in slots_T.unique().tolist():
            if slot < 0:
                continue  # no adapter
            rows = (slots_T == slot).nonzero().flatten()
            first, last = int(rows[0]), int(rows[-1])
            together = last - first + 1 == len(rows)
            self._groups.append((slot, slice(first, last + 1) if together else rows))

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
        """Add x_TD A^T B^T to y_TO, each token with its own adapter's A [S, 1, r, D] and B [S, 1, O, r].

        Args:
            lora_a_stacked, lora_b_stacked: for each part of the output, side by side, of the widths ``output_slices``.
            buffer: not needed here.
        """
        x_TD, y_TO = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for slot, rows in self._groups:
            x_GD = x_TD[rows]
            begin = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                narrow_Gr = x_GD @ a[slot, 0].T
                if isinstance(rows, slice):
                    y_TO[rows, begin : begin + width].addmm_(narrow_Gr, b[slot, 0].T, alpha=scale)
                else:
                    part_GO = torch.mm(narrow_Gr, b[slot, 0].T).mul_(scale)
                    y_TO[:, begin : begin + width].index_add_(0, rows, part_GO)
                begin += width

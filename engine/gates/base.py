"""What a kind of gate is. Shapes: B rows, I inputs, K experts, D hidden size, F features, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engine.gates.features import distribution_features

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class GateKind:
    """One way from inputs to the values of the experts.

    Attributes:
        name: as the artifact has it.
        first: names of weight [*, I] and bias [*] of the layer that reads the inputs: what a scale of the inputs is
            folded into.
        hidden: names of the tensors beside ``theta`` and ``bias``, which every kind has: one row per expert.
        shapes: from the number of inputs, the number of experts and ``width`` to each tensor's shape.
        logits: gate logits [B, K] in float32 of inputs [B, I] in float32.
    """

    name: str
    first: tuple[str, str]
    hidden: tuple[str, ...]
    shapes: Callable[[int, int, int], dict[str, tuple[int, ...]]]
    logits: Callable[[Tensors, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class GateFunction:
    """A gate as a function of what the base's step leaves on the device: float32 throughout."""

    kind: GateKind
    features: tuple[str, ...]
    tensors: Tensors

    def to(self, device: torch.device) -> GateFunction:
        """The same on another device."""
        return GateFunction(self.kind, self.features, {name: t.to(device) for name, t in self.tensors.items()})

    def __call__(self, hidden_BD: torch.Tensor, logits_BV: torch.Tensor | None = None) -> torch.Tensor:
        """Gate logits [B, K]; with K = 1 a token is deferred with probability sigmoid(logit).

        Args:
            hidden_BD: the LM head's input.
            logits_BV: the base's logits over the real vocabulary; only a gate with features reads them.
        """
        inputs_BI = hidden_BD.float()
        if self.features:
            assert logits_BV is not None
            inputs_BI = torch.cat([inputs_BI, distribution_features(self.features, logits_BV)], dim=1)
        return self.kind.logits(self.tensors, inputs_BI)

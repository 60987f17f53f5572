"""One hidden layer with SiLU between the inputs and the experts' vectors, which then have its width."""

import torch
from torch.nn.functional import linear, silu

from engine.gates.base import GateKind, Tensors

_WEIGHT, _BIAS = "hidden_weight", "hidden_bias"


def _shapes(inputs: int, experts: int, width: int) -> dict[str, tuple[int, ...]]:
    return {_WEIGHT: (width, inputs), _BIAS: (width,), "theta": (experts, width), "bias": (experts,)}


def _logits(tensors: Tensors, inputs_BI: torch.Tensor) -> torch.Tensor:
    hidden_BH = silu(linear(inputs_BI, tensors[_WEIGHT], tensors[_BIAS]))
    return linear(hidden_BH, tensors["theta"], tensors["bias"])


MLP = GateKind("mlp", (_WEIGHT, _BIAS), (_WEIGHT, _BIAS), _shapes, _logits)

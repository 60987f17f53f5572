"""The method's gate (arXiv 2403.03870): one vector per expert over the inputs."""

import torch

from engine.gates.base import GateKind, Tensors


def _shapes(inputs: int, experts: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"theta": (experts, inputs), "bias": (experts,)}


def _logits(tensors: Tensors, inputs_BI: torch.Tensor) -> torch.Tensor:
    return inputs_BI @ tensors["theta"].T + tensors["bias"]


LINEAR = GateKind("linear", ("theta", "bias"), (), _shapes, _logits)

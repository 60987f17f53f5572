"""How far a gate's probabilities are to be believed: the share of tokens that need an expert, by probability.

Teacher-forced, on text that the gate has not learned from. A token needs an expert where one has its gold token and the
base has not. Bins hold as many tokens each, so that a gate that is sure of itself has no empty ones. (Equal-mass bins
and the expected calibration error: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning",
2015.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BINS = 10

Curve = list[dict[str, float]]
"""Bins, in the order of their probability: "probability" (mean), "needed" (share of the tokens), "tokens"."""


def reliability(deferral_N: torch.Tensor, needed_N: torch.Tensor, bins: int = BINS) -> Curve:
    """The reliability curve of deferral probabilities [N]; at most as many bins as there are tokens."""
    order_N = deferral_N.argsort(stable=True)
    parts = zip(
        torch.tensor_split(deferral_N[order_N].double(), bins),
        torch.tensor_split(needed_N[order_N].double(), bins),
        strict=True,
    )
    return [
        {"probability": float(said.mean()), "needed": float(found.mean()), "tokens": float(len(said))}
        for said, found in parts
        if len(said)
    ]


def calibration_error(curve: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: the mean over tokens of |probability - share| of their bins."""
    tokens = sum(point["tokens"] for point in curve)
    return sum(point["tokens"] * abs(point["probability"] - point["needed"]) for point in curve) / tokens

"""What a request to write by characters may ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.types import GenerationRequest

WEIGHTS_SUM = 1e-6
"""How far the sum of weights may be from 1."""

TOKEN_FIELDS = (
    ("logit_bias", None),
    ("allowed_token_ids", None),
    ("bad_words", ()),
    ("stop_token_ids", ()),
    ("logprobs", None),
    ("prompt_logprobs", None),
    ("structured_outputs", None),
)
"""Sampling parameters that speak of token ids, with the values that ask for nothing. Where members have no tokens in
common they mean nothing."""

TOKEN_SAMPLING = (
    ("top_p", 1.0),
    ("top_k", 0),
    ("min_p", 0.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
    ("repetition_penalty", 1.0),
)
"""Those that change how tokens are drawn; none is drawn here."""

OF_DEFERRAL = (
    ("policy", None),
    ("threshold", None),
    ("max_expert_tokens", None),
    ("experts", None),
    ("run_ahead", None),
    ("blend", None),
)
"""What ``collaboration`` asks of deferral."""


def problem(request: GenerationRequest) -> str | None:
    """Why a request cannot be written by characters; None if it can."""
    for name, nothing in (*TOKEN_FIELDS, *TOKEN_SAMPLING):
        if getattr(request.sampling, name) not in (nothing, {}):
            return f"{name} is for texts that are drawn token by token"
    for name, nothing in OF_DEFERRAL:
        if getattr(request.collaboration, name) != nothing:
            return f"{name} is for the strategy 'deferral'"
    return None


def members(weights: Sequence[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """Members that weigh something, by lane number, with their weights.

    Args:
        weights: as asked for; empty is equal weights for all.
        count: of the engine's members.

    Raises:
        ValueError: the weights are none; the message says why.
    """
    if not weights:
        return [(lane, 1.0 / count) for lane in range(count)]
    lanes = [lane for lane, _ in weights]
    if len(set(lanes)) < len(lanes) or not set(lanes) <= set(range(count)):
        raise ValueError("weights must name members, each once")
    if any(not (math.isfinite(weight) and weight >= 0) for _, weight in weights):
        raise ValueError("weights must not be negative")
    total = sum(weight for _, weight in weights)
    if abs(total - 1.0) > WEIGHTS_SUM:
        raise ValueError(f"weights must sum to 1, not {total:g}")
    return sorted((lane, weight) for lane, weight in weights if weight > 0)

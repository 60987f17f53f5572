"""A pair of random models in memory, for tests of loops without an engine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle.reference import Pair

VOCAB = 64
WIDTH = 32


def tiny_pair(layers: int) -> Pair:
    """A base and two experts in float32, with a gate; token 0 ends a text."""
    models = [_model(seed, layers) for seed in (1, 2, 3)]
    return Pair(models[0], models[1:], torch.randn(2, WIDTH) * 0.5, torch.tensor([0.1, -0.2]), 0)


def _model(seed: int, layers: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()

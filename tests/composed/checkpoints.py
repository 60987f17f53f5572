"""Small random members and compositions of them, on disk.

As in tests/oracle/pairs.py the weights are wide, so that no two logits come near each other by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.composed.artifact import Composition, Connection, Heads, make_member
from tests.oracle.pairs import save_tokenizer

VOCABULARY = 512
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_WITHOUT_WINDOW = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}


@dataclass(frozen=True)
class Plan:
    """A composition to be made: architectures by "anchor" and by the augmenting models' names."""

    anchor: str
    augmenting: dict[str, str]
    connections: tuple[Connection, ...]
    heads: Heads


LLAMA = Plan("llama", {"other": "qwen2"}, (Connection("other", 1, 1), Connection("other", 2, 2)), Heads(4, 4, 32))
PLANS = {
    "llama reads qwen2": LLAMA,
    "qwen2 reads llama": Plan("qwen2", {"one": "llama"}, (Connection("one", 3, 2),), Heads(4, 1, 64)),
    "qwen3 reads llama and mistral, grouped, normalised": Plan(
        "qwen3",
        {"first": "llama", "second": "mistral"},
        (Connection("first", 1, 1), Connection("second", 2, 1), Connection("first", 3, 2)),
        Heads(4, 2, 32, normalize=True),
    ),
    "mistral reads gemma": Plan("mistral", {"gem": "gemma"}, (Connection("gem", 2, 1),), Heads(4, 4, 32)),
    "gemma reads qwen3": Plan("gemma", {"third": "qwen3"}, (Connection("third", 2, 2),), Heads(2, 2, 32)),
}


def save_member(folder: Path, architecture: str, *, layers: int, width: int, seed: int, **more: Any) -> Path:
    """A random checkpoint."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=None,
        **{
            "initializer_range": 0.05 if architecture == "gemma" else 0.3,
            **_WITHOUT_WINDOW.get(architecture, {}),
            **more,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, VOCABULARY)
    return folder


def save_composition(folder: Path, plan: Plan, *, scale: float = 1.0, seed: int = 11) -> Path:
    """Members and a composition with random connections below ``folder``; the folder of the composition.

    Args:
        scale: of the output weights; 0 is a composition that was not trained.
    """
    anchor = save_member(folder / "anchor", plan.anchor, layers=2, width=128, seed=1)
    augmenting = {
        name: save_member(folder / name, architecture, layers=3, width=192, seed=2 + number)
        for number, (name, architecture) in enumerate(plan.augmenting.items())
    }
    return compose(folder / "composed", anchor, augmenting, plan.connections, plan.heads, scale=scale, seed=seed)


def compose(
    folder: Path,
    anchor: Path,
    augmenting: dict[str, Path],
    connections: Sequence[Connection],
    heads: Heads,
    *,
    scale: float,
    seed: int,
) -> Path:
    """A composition of checkpoints that are there."""
    composition = Composition(
        anchor=make_member("anchor", anchor),
        augmenting=tuple(make_member(name, path) for name, path in augmenting.items()),
        connections=tuple(connections),
        heads=heads,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in composition.shapes().items():
        of_output = name.endswith(".output.weight")
        tensors[name] = torch.randn(shape, generator=generator) * (scale if of_output else 1.0) / shape[1] ** 0.5
    composition.save(folder, tensors)
    return folder

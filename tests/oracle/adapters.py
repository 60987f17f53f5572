"""A base with LoRA adapters as experts, on disk and as Hugging Face models; random weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.checkpoints import Checkpoint
from engine.config import EngineConfig, ExpertConfig
from engine.gate import GateArtifact
from tests.oracle.pairs import Served, random_pair
from tests.oracle.reference import Pair

LAYERS = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Adapted:
    """The pair, its experts' folders being adapters."""

    served: Served

    def config(self, *, own_lanes: bool = False, **settings: Any) -> EngineConfig:
        """As guests of the base; or with ``own_lanes`` each as a lane of its own on the same weights."""
        served = self.served
        whole = replace(served, experts=dict.fromkeys(served.experts, served.base)).config(**settings)
        experts = tuple(
            expert.model_copy(update={"adapter": str(folder)})
            if own_lanes
            else ExpertConfig.model_validate({"name": expert.name, "adapter": str(folder)})
            for expert, folder in zip(whole.experts, served.experts.values(), strict=True)
        )
        return EngineConfig.model_validate(whole.model_copy(update={"experts": experts}).model_dump())


def save_adapter(base: Path, folder: Path, seed: int, *, strength: float, rank: int = 5, **settings: Any) -> None:
    """An adapter with random matrices; with a small ``strength`` it often agrees with its model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(LAYERS), "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(model, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=strength)
    adapted.save_pretrained(folder)


def adapted_model(base: Any, folder: Path) -> Any:
    """A copy of the model with the adapter in it, not merged."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).base_model.model.eval()


def adapted_pair(directory: Path, strengths: Sequence[float] = (0.04, 0.3)) -> Adapted:
    """The random pair's base with one adapter for each strength, and a gate that chooses among them."""
    plain = random_pair(directory / "plain")
    experts = {}
    for number, strength in enumerate(strengths, start=1):
        experts[f"adapter{number}"] = directory / f"adapter{number}"
        save_adapter(plain.base, directory / f"adapter{number}", number, strength=strength, rank=4 + number)
    identity = Checkpoint(plain.base).identity
    base = plain.reference.base
    width = base.config.hidden_size
    torch.manual_seed(7)
    GateArtifact(
        theta=torch.randn(len(experts), width) * 4 / width**0.5,
        bias=torch.full((len(experts),), -0.5),
        experts=tuple(experts),
        base=identity,
        expert_identities=(identity,) * len(experts),
    ).save(directory / "gate")
    gate = load_file(str(directory / "gate" / "gate.safetensors"))
    models = [adapted_model(base, folder) for folder in experts.values()]
    reference = Pair(base, models, gate["theta"], gate["bias"], 0)
    return Adapted(Served(plain.base, experts, directory / "gate", reference, 192))

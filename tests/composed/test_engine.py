"""Composed checkpoints in the engine: as base and as expert of a pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints import model_identity
from engine.client import Engine
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig
from engine.gate import GateArtifact, gate_logits
from engine.types import GenerationRequest, SamplingSpec
from tests.composed import one_lane
from tests.composed.reference import Reference

BASE, EXPERT = "llama reads qwen2", "qwen2 reads llama"
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 160}
COUNT = 16


def lane(folder: Path, **more: Any) -> LaneConfig:
    return LaneConfig(model=str(folder), kv_cache_memory_bytes=64 << 20, vllm=OPTIONS, **more)


def requests(prompts: list[list[int]]) -> list[GenerationRequest]:
    sampling = SamplingSpec(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
    return [GenerationRequest(str(number), prompt, sampling) for number, prompt in enumerate(prompts)]


def test_base_and_expert_of_a_pair(composed: Callable[[str], Path], tmp_path: Path) -> None:
    """Co-LLM over CALM: the gate reads the composed states; token for token and source for source as a plain loop."""
    folders = [composed(BASE), composed(EXPERT)]
    torch.manual_seed(3)
    theta_KD, bias_K = torch.randn(1, 128) * 0.3, torch.zeros(1)
    GateArtifact(
        theta=theta_KD,
        bias=bias_K,
        experts=("second",),
        base=model_identity(folders[0]),
        expert_identities=(model_identity(folders[1]),),
    ).save(tmp_path / "gate")
    references = [Reference(folder) for folder in folders]
    prompts = one_lane.prompts()[:8]
    expected = []
    for prompt in prompts:
        tokens, sources = list(prompt), []
        for _ in range(COUNT):
            hidden_D, logits_V = references[0].hidden_and_logits(tokens)
            sources.append(int(torch.sigmoid(gate_logits(hidden_D[None], theta_KD, bias_K)) > 0.5))
            if sources[-1]:
                logits_V = references[1].logits(tokens)[-1]
            tokens.append(int(logits_V.argmax()))
        expected.append((tokens[len(prompt) :], sources))
    assert {source for _, sources in expected for source in sources} == {0, 1}
    config = EngineConfig(
        base=lane(folders[0]),
        experts=(ExpertConfig(name="second", **lane(folders[1]).model_dump()),),
        gate=GateConfig(path=str(tmp_path / "gate")),
    )
    with Engine(config) as engine:
        completions = engine.generate(requests(prompts))
    assert [(one.tokens, one.sources) for one in completions] == expected

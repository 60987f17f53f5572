"""Composed checkpoints in the engine: as base and expert of a pair, and refused by name where need be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints import model_identity
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig
from engine.gate import GateArtifact, gate_logits
from engine.offline import Engine
from engine.types import GenerationRequest, SamplingSpec
from tests.composed import one_lane
from tests.composed.reference import Reference
from tests.packaging.sources import ROOT

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


@pytest.mark.slow
@pytest.mark.parametrize("name", [BASE, "qwen3 reads llama and mistral, grouped, normalised"])
def test_two_shards(name: str, composed: Callable[[str], Path]) -> None:
    """tensor_parallel_size 2, in two worker processes: each has half of the heads of members and connections."""
    config = EngineConfig(base=lane(composed(name), executor="mp", tensor_parallel_size=2))
    prompts = one_lane.prompts()[:8]
    with Engine(config) as engine:
        completions = engine.generate(requests(prompts))
    reference = Reference(composed(name))
    assert [one.tokens for one in completions] == [reference.greedy(prompt, COUNT) for prompt in prompts]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "pipeline": (BASE, {"pipeline_parallel_size": 2}, "pipeline_parallel_size: a composed model cannot be split"),
    "lora": (BASE, {"enable_lora": True}, "enable_lora: not for composed models"),
    "context": (BASE, {"max_model_len": 2048}, "max_model_len"),
    "heads": (EXPERT, {"tensor_parallel_size": 2}, "2 does not divide the composition's kv_heads, 1"),
    "embeddings": (BASE, {"enable_prompt_embeds": True}, "enable_prompt_embeds: a composed model reads token ids"),
}

_TRY = """
import json, logging, sys
from vllm.engine.arg_utils import EngineArgs
logging.disable()
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    try:
        EngineArgs(dtype="float32", distributed_executor_backend="mp", **arguments).create_engine_config()
    except Exception as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals(composed: Callable[[str], Path]) -> dict[str, str]:
    """What vLLM says while it makes its configuration, before any weight is read; a process for all of them."""
    asked = {name: {"model": str(composed(which)), **options} for name, (which, options, _) in REFUSED.items()}
    result = subprocess.run(
        [sys.executable, "-c", _TRY, json.dumps(asked)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, refusals: dict[str, str]) -> None:
    assert REFUSED[name][2] in refusals[name]

"""Reference-format checkpoints (V+1 outputs), pairs without a gate, and lanes sharded over worker processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import GATE_IN_HEAD
from engine.config import EngineConfig
from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from engine.vllm_hooks.load import make_plan
from tests.oracle import pairs
from tests.oracle.checks import assert_empty, assert_same, run
from tests.oracle.reference import Pair, Written, greedy


def _requests(prompts: list[list[int]], max_tokens: int = 20) -> list[GenerationRequest]:
    sampling = SamplingSpec(temperature=0.0, max_tokens=max_tokens, logprobs=1)
    return [GenerationRequest(f"{number}", prompt, sampling) for number, prompt in enumerate(prompts)]


def _with_gate_in_head(served: pairs.Served, directory: Path) -> pairs.Served:
    """The same base in the reference format: one more output, whose row is theta. The bias is dropped."""
    weights = load_file(str(served.base / "model.safetensors"))
    config = json.loads((served.base / "config.json").read_text())
    config["vocab_size"] += 1
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = torch.cat([head, served.reference.theta.to(head.dtype)])
    embeddings = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embeddings, torch.zeros_like(embeddings[:1])])
    directory.mkdir()
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {GATE_IN_HEAD: True}))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / file).write_text((served.base / file).read_text())
    reference = served.reference
    return pairs.Served(
        directory,
        served.experts,
        served.gate,
        Pair(reference.base, reference.experts, reference.theta, torch.zeros(1), reference.eos),
        served.max_model_len,
    )


def test_reference_format(random_pair: pairs.Served, prompts: list[list[int]], tmp_path: Path) -> None:
    served = _with_gate_in_head(random_pair, tmp_path / "base")
    expected = [greedy(served.reference, prompt, 20) for prompt in prompts[:16]]
    assert {source for one in expected for source in one.sources} == {0, 1}
    with Engine(served.config(gate=False)) as engine:
        assert engine.info.gate is not None
        assert engine.info.gate.source == "lm_head"
        assert engine.info.vocab_size == 512
        completions = run(engine, _requests(prompts[:16]), 16)
        assert_same(completions, expected)
        # The gate's column is no token: the top log-probabilities are those of the real vocabulary.
        for completion in completions:
            assert completion.logprobs is not None
            assert all(token < 512 for found in completion.logprobs for token in found.token_ids)
        drawn = engine.generate(
            GenerationRequest(f"hot-{number}", prompts[number], SamplingSpec(temperature=2.0, max_tokens=40))
            for number in range(32)
        )
        assert all(token < 512 for one in drawn for token in one.tokens)
        assert_empty(engine)


def test_one_row_more_is_padding_unless_asked_for(random_pair: pairs.Served, tmp_path: Path) -> None:
    """A base with one row more than its expert is not for that reason in the reference format."""
    served = _with_gate_in_head(random_pair, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    del config[GATE_IN_HEAD]
    file.write_text(json.dumps(config))
    plan = make_plan(served.config(gate=False))
    assert (plan.gate, plan.gate_in_head) == (None, False)
    assert plan.shared.masked(0) == [(512, 513)]
    asked = served.config(gate=False).model_dump()
    asked["gate"] = {"in_lm_head": True}
    plan = make_plan(EngineConfig.model_validate(asked))
    assert plan.gate is not None
    assert (plan.gate.source, plan.gate_in_head) == ("lm_head", True)


def test_pair_without_a_gate(random_pair: pairs.Served, twin_engine: Engine, prompts: list[list[int]]) -> None:
    """Policies that need no gate are served; those that do are refused, request by request."""
    assert make_plan(random_pair.config(gate=False)).gate is None
    assert twin_engine.info.gate is None
    assert twin_engine.info.policy == "confidence"
    assert twin_engine.info.thresholds == {"confidence": 0.5}
    refused, confident = twin_engine.generate(
        [
            GenerationRequest("threshold", prompts[0], collaboration=Collaboration(policy="threshold")),
            GenerationRequest(
                "confidence",
                prompts[0],
                SamplingSpec(temperature=0.0, max_tokens=20),
                Collaboration(policy="confidence", experts=(1,)),
            ),
        ]
    )
    assert refused.finish_reason == "error"
    assert refused.error == "policy 'threshold' needs a gate, and none is served"
    assert_same([confident], [greedy(random_pair.reference, prompts[0], 20, policy="confidence")])


@pytest.mark.parametrize("coordination", ["lockstep", pytest.param("overlapped", marks=pytest.mark.slow)])
def test_expert_in_two_shards(
    coordination: str, random_pair: pairs.Served, prompts: list[list[int]], written: list[Written]
) -> None:
    """Base in the engine's process, expert with tensor_parallel_size 2 in two worker processes."""
    settings = {"coordination": coordination, "executor": "mp", "tensor_parallel_size": 2}
    with Engine(random_pair.config(**settings)) as engine:  # type: ignore[arg-type]
        assert_same(run(engine, _requests(prompts[:16], 50), 16), written[:16])
        assert_empty(engine)

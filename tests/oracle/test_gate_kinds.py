"""A gate that is more than a vector: what the base's lane computes is what the models say, position by position."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.gate import GateArtifact
from engine.offline import Engine
from engine.types import GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import assert_empty
from tests.oracle.reference import hidden_and_logits

FEATURES = ("margin", "entropy", "logprob_2")
WIDTH = 8


def mlp_gate(served: pairs.Served) -> GateArtifact:
    torch.manual_seed(3)
    plain = GateArtifact.load(served.gate)
    return dataclasses.replace(
        plain,
        theta=torch.randn(1, WIDTH) * 0.7,
        bias=torch.full((1,), -0.1),
        kind="mlp",
        features=FEATURES,
        layers={
            "hidden_weight": torch.randn(WIDTH, plain.hidden_size + len(FEATURES)) * 0.2,
            "hidden_bias": torch.randn(WIDTH),
        },
    )


def deferral_by_hand(gate: GateArtifact, hidden: torch.Tensor, logits: torch.Tensor) -> float:
    logp = torch.log_softmax(logits.double(), 0)
    ordered = logp.sort(descending=True).values
    features = torch.stack([ordered[0] - ordered[1], -(logp.exp() * logp).sum(), ordered[1]])
    inputs = torch.cat([hidden.double(), features])
    inner = F.silu(gate.layers["hidden_weight"].double() @ inputs + gate.layers["hidden_bias"].double())
    return 1 / (1 + math.exp(-float(gate.theta.double()[0] @ inner + gate.bias.double()[0])))


def test_values_are_the_models_own(random_pair: pairs.Served, prompts: list[list[int]], tmp_path: Path) -> None:
    gate = mlp_gate(random_pair)
    gate.save(tmp_path / "gate")
    served = dataclasses.replace(random_pair, gate=tmp_path / "gate")
    sampling = SamplingSpec(temperature=0.0, max_tokens=12)
    asked = prompts[:12]
    with Engine(served.config()) as engine:
        found = engine.generate([GenerationRequest(str(n), prompt, sampling) for n, prompt in enumerate(asked)])
        assert_empty(engine)
    assert {source for one in found for source in one.sources} == {0, 1}
    for prompt, one in zip(asked, found, strict=True):
        for at, (source, deferral) in enumerate(zip(one.sources, one.deferrals, strict=True)):
            with torch.inference_mode():
                hidden, logits = hidden_and_logits(random_pair.reference.base, prompt + one.tokens[:at])
            expected = deferral_by_hand(gate, hidden, logits)
            assert deferral == pytest.approx(expected, abs=2e-4)
            if abs(expected - 0.5) > 1e-3:
                assert source == (expected > 0.5)

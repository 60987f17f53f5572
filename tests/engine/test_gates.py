"""Kinds of gates: values against torch's own modules, features against definitions, the artifact's second format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoints import ModelIdentity
from engine.errors import GateError
from engine.gate import GateArtifact
from engine.gates import FEATURES, KINDS, distribution_features

D, K, H = 6, 2, 5
IDENTITY = ModelIdentity("a", "b", {}, 3)


def artifact(kind: str, features: tuple[str, ...] = ()) -> GateArtifact:
    torch.manual_seed(0)
    shapes = KINDS[kind].shapes(D + len(features), K, H)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    theta, bias = tensors.pop("theta"), tensors.pop("bias")
    return GateArtifact(
        theta, bias, ("x", "y"), IDENTITY, (None, None), kind=kind, features=features, layers=tensors, date="2026-01-01"
    )


def test_an_mlp_is_torchs() -> None:
    gate = artifact("mlp")
    model = torch.nn.Sequential(torch.nn.Linear(D, H), torch.nn.SiLU(), torch.nn.Linear(H, K))
    named = ("hidden_weight", "hidden_bias", "theta", "bias")
    model.load_state_dict(dict(zip(model.state_dict(), (gate.tensors[name] for name in named), strict=True)))
    hidden = torch.randn(7, D)
    torch.testing.assert_close(gate.function(hidden), model(hidden))
    assert gate.function(hidden.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("vocabulary", [5, 50, 256 * 6, 256 * 9 + 17])
def test_features_are_what_their_names_say(vocabulary: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(40, vocabulary + 3)[:, :vocabulary] * 3  # a view, as of a padded head
    logits[:20, -1] = 12.0  # where no block is whole
    found = dict(zip(FEATURES, distribution_features(FEATURES, logits).T, strict=True))
    spread = torch.distributions.Categorical(logits=logits)
    ordered = torch.log_softmax(logits, 1).sort(dim=1, descending=True).values
    torch.testing.assert_close(found["entropy"], spread.entropy())
    torch.testing.assert_close(found["margin"], ordered[:, 0] - ordered[:, 1])
    for rank in range(1, 6):
        torch.testing.assert_close(found[f"logprob_{rank}"], ordered[:, rank - 1])
    assert torch.equal(distribution_features(("margin",), logits)[:, 0], found["margin"])


def test_features_are_finite_whatever_the_model_rules_out() -> None:
    logits = torch.full((2, 7), float("-inf"))
    logits[:, 3] = 80.0
    assert distribution_features(FEATURES, logits).isfinite().all()
    assert distribution_features(FEATURES, torch.zeros(1, 2)).isfinite().all()
    assert distribution_features(FEATURES, torch.zeros(0, 5000)).shape == (0, len(FEATURES))


@pytest.mark.parametrize(("kind", "features"), [("mlp", ()), ("mlp", FEATURES), ("linear", ("entropy",))])
def test_the_second_format_is_loaded_as_saved(tmp_path: Path, kind: str, features: tuple[str, ...]) -> None:
    gate = artifact(kind, features)
    gate.save(tmp_path)
    assert json.loads((tmp_path / "gate.json").read_text())["format_version"] == 2
    found = GateArtifact.load(tmp_path)
    assert (found.kind, found.features, found.hidden_size) == (kind, features, D)
    hidden, logits = torch.randn(3, D), torch.randn(3, 20)
    assert torch.equal(found.function(hidden, logits), gate.function(hidden, logits))
    only = found.only("y")
    torch.testing.assert_close(only.function(hidden, logits)[:, 0], gate.function(hidden, logits)[:, 1])


def test_a_linear_gate_is_of_the_first_format(tmp_path: Path) -> None:
    artifact("linear").save(tmp_path)
    fields = json.loads((tmp_path / "gate.json").read_text())
    assert fields["format_version"] == 1
    assert not {"kind", "features"} & fields.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "forest"}, r"gate\.json: field kind: is 'forest'; this program knows linear, mlp"),
        ({"features": ["mood"]}, r"gate\.json: field features: has 'mood' twice, or it is none of entropy"),
        ({"features": ["margin", "margin"]}, r"gate\.json: field features: has 'margin' twice"),
        ({"features": []}, r"gate\.safetensors: field hidden_weight: has shape \[5, 7\], not \[5, 6\]"),
        ({"kind": "linear"}, r"gate\.safetensors: field theta: has shape \[2, 5\], not \[2, 7\]"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    artifact("mlp", ("margin",)).save(tmp_path)
    fields = json.loads((tmp_path / "gate.json").read_text()) | changes
    (tmp_path / "gate.json").write_text(json.dumps(fields))
    with pytest.raises(GateError, match=message):
        GateArtifact.load(tmp_path)

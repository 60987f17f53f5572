"""The regret artifact: saving, loading, what is refused; the pure part's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from engine.checkpoints import ModelIdentity
from engine.errors import GateError
from engine.hindsight import NUMBERS, Hindsight, numbers_of
from engine.regret import RegretArtifact

BASE = ModelIdentity("a" * 64, "b" * 64, {"hidden_size": 6}, 32)


def artifact(kind: str = "mlp") -> RegretArtifact:
    drawn = torch.Generator().manual_seed(0)
    width = 3 if kind == "mlp" else 7
    layers = {"hidden_weight": torch.randn(3, 7, generator=drawn), "hidden_bias": torch.randn(3, generator=drawn)}
    return RegretArtifact(
        theta=torch.randn(1, width, generator=drawn),
        bias=torch.tensor([0.5]),
        numbers=torch.tensor([0.1, -0.2, 0.3, -0.4]),
        ahead=4,
        base=BASE,
        default_threshold=0.5,
        kind=kind,
        features=("entropy",),
        layers=layers if kind == "mlp" else {},
    )


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    saved = artifact(kind)
    saved.save(tmp_path)
    loaded = RegretArtifact.beside(tmp_path)
    assert loaded is not None
    hidden, logits = torch.randn(5, 6), torch.randn(5, 32)
    assert torch.equal(loaded.function(hidden, logits), saved.function(hidden, logits))
    assert loaded.function(hidden, logits).shape == (5, 1)
    assert loaded.hindsight == saved.hindsight == Hindsight(4, tuple(saved.numbers.tolist()), 0.5)
    assert (loaded.hidden_size, loaded.features, loaded.base) == (6, ("entropy",), BASE)
    assert RegretArtifact.beside(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ahead", 0, "field ahead: is 0, not 1 to 16"),
        ("ahead", 17, "field ahead: is 17, not 1 to 16"),
        ("format_version", 2, "field format_version: is 2; this program reads 1"),
        ("kind", "conv", "field kind: is 'conv'"),
        ("features", ["entropy", "entropy"], "field features: has 'entropy' twice"),
        ("hidden_size", 9, "field hidden_weight: has shape"),
        ("default_threshold", "half", "field default_threshold: has the wrong type"),
    ],
)
def test_a_wrong_field_is_named(name: str, value: object, message: str, tmp_path: Path) -> None:
    artifact().save(tmp_path)
    file = tmp_path / "regret.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(GateError, match=message.replace("(", r"\(")):
        RegretArtifact.load(tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    artifact().save(tmp_path)
    (tmp_path / "regret.safetensors").write_bytes(b"none")
    with pytest.raises(GateError, match="cannot be read as safetensors"):
        RegretArtifact.load(tmp_path)
    (tmp_path / "regret.safetensors").unlink()
    with pytest.raises(GateError, match="no such file"):
        RegretArtifact.load(tmp_path)


def test_regret_is_the_logistic_of_both_parts() -> None:
    numbers = numbers_of(0.5, 0.9, 1.0, [0.8, 0.2])
    assert len(numbers) == len(NUMBERS)
    assert numbers == pytest.approx([0.0, math.log(9), math.log((1 - 1e-6) / 1e-6), math.log(0.25)])
    assert numbers_of(0.5, 0.5, 0.5, [])[3] == numbers[2]
    hindsight = Hindsight(4, (1.0, -1.0, 0.0, 0.0), 0.5)
    assert hindsight.regret(2.0, numbers) == pytest.approx(1 / (1 + math.exp(-(2 - math.log(9)))))
    assert hindsight.regret(-1000.0, numbers) == pytest.approx(0.0)
    assert hindsight.regret(1000.0, numbers) == 1.0
    assert math.isnan(hindsight.regret(math.inf, numbers))

"""The gate artifact: what is saved is loaded, and what is wrong is refused in one clear line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoints import ModelIdentity, model_identity
from engine.gate import GateArtifact, GateError, gate_logits

D = 8


def make_model(directory: Path, hidden_size: int = D, tokens: tuple[str, ...] = ("a", "b")) -> Path:
    """The two files of a checkpoint that an identity is made from."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "hidden_size": hidden_size, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}},
        "added_tokens": [{"content": "<|endoftext|>", "id": len(tokens)}],
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def make_gate(root: Path, **changes: Any) -> GateArtifact:
    base = model_identity(make_model(root / "base"))
    expert = model_identity(make_model(root / "codes", hidden_size=2 * D))
    gate = GateArtifact(
        theta=torch.arange(D, dtype=torch.float32).reshape(1, D),
        bias=torch.zeros(1),
        experts=("codes",),
        base=base,
        expert_identities=(expert,),
        default_threshold=0.25,
        calibration=[{"threshold": 0.25, "score": 0.9}],
        training={"steps": 3},
        data="made up",
        date="2026-01-01",
    )
    return replace(gate, **changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a good artifact."""
    make_gate(tmp_path).save(tmp_path / "gate")
    return tmp_path / "gate"


def test_what_is_saved_is_loaded(tmp_path: Path, saved: Path) -> None:
    wanted, found = make_gate(tmp_path), GateArtifact.load(saved)
    assert torch.equal(found.theta, wanted.theta)
    assert torch.equal(found.bias, wanted.bias)
    for field in set(vars(wanted)) - {"theta", "bias"}:
        assert getattr(found, field) == getattr(wanted, field), field
    assert found.hidden_size == D


def test_some_of_the_experts() -> None:
    identity = ModelIdentity("a", "b", {}, 3)
    names = ("codes", "law", "art")
    whole = GateArtifact(torch.randn(3, D), torch.randn(3), names, identity, (None, identity, None), calibration=[{}])
    part = whole.only("art", "law")
    assert torch.equal(part.theta, whole.theta[[2, 1]])
    assert torch.equal(part.bias, whole.bias[[2, 1]])
    assert (part.experts, part.expert_identities, part.calibration) == (("art", "law"), (None, identity), None)
    with pytest.raises(GateError, match=r"experts codes, law, art, not music"):
        whole.only("codes", "music")


def test_an_expert_without_identity_is_not_checked(tmp_path: Path) -> None:
    make_gate(tmp_path, expert_identities=(None,)).save(tmp_path / "gate")
    make_model(tmp_path / "other", hidden_size=99)
    GateArtifact.load(tmp_path / "gate").check_fits(tmp_path / "base", [tmp_path / "other"])


def test_gate_logits_are_float32_and_linear() -> None:
    hidden = torch.randn(3, D, dtype=torch.bfloat16)
    theta, bias = torch.randn(2, D), torch.randn(2)
    logits = gate_logits(hidden, theta, bias)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.nn.functional.linear(hidden.float(), theta, bias))


def test_fits_its_models(tmp_path: Path, saved: Path) -> None:
    GateArtifact.load(saved).check_fits(tmp_path / "base", [tmp_path / "codes"])


def test_precision_and_token_settings_are_not_identity(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    before = model_identity(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"dtype": "bfloat16", "eos_token_id": 7, "_name_or_path": "x"}
    (directory / "config.json").write_text(json.dumps(config))
    assert model_identity(directory) == before


def test_says_which_model_differs_and_how(tmp_path: Path, saved: Path) -> None:
    gate = GateArtifact.load(saved)
    base, expert = tmp_path / "base", tmp_path / "codes"
    wider = make_model(tmp_path / "wider", hidden_size=16)
    renamed = make_model(tmp_path / "renamed", hidden_size=2 * D, tokens=("a", "c", "d"))
    with pytest.raises(GateError, match=r"base in .*wider.*hidden_size is 16, not 8"):
        gate.check_fits(wider, [expert])
    with pytest.raises(GateError, match=r"expert codes in .*tokenizer.*4 tokens, not 3"):
        gate.check_fits(base, [renamed])
    with pytest.raises(GateError, match=r"1 experts \(codes\), 2 are given"):
        gate.check_fits(base, [expert, expert])


def test_unigram_vocabularies_have_an_identity(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    vocabulary = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert model_identity(directory).tokens == 2


@pytest.mark.parametrize("missing", ["gate.json", "gate.safetensors"])
def test_refuses_a_missing_file(saved: Path, missing: str) -> None:
    (saved / missing).unlink()
    with pytest.raises(GateError, match=f"{missing}: no such file"):
        GateArtifact.load(saved)


@pytest.mark.parametrize("name", ["gate.json", "gate.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 40])
def test_refuses_truncated_files(saved: Path, name: str, keep: int) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    with pytest.raises(GateError, match=f"{name}: cannot be read") as error:
        GateArtifact.load(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["format_version", "experts", "hidden_size", "default_policy", "default_threshold",
            "base", "expert_identities", "calibration", "training", "data", "date"],
)  # fmt: skip
def test_refuses_a_missing_field(saved: Path, key: str) -> None:
    fields = json.loads((saved / "gate.json").read_text())
    del fields[key]
    (saved / "gate.json").write_text(json.dumps(fields))
    with pytest.raises(GateError, match=rf"gate\.json: field {key}: missing"):
        GateArtifact.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version: is 3; this program reads 1 and 2"),
        ({"experts": []}, "experts: is not a list of names"),
        ({"experts": ["x", "x"]}, "experts: has a name twice"),
        ({"experts": "codes"}, "experts: has the wrong type, str"),
        ({"experts": ["a", "b"]}, "expert_identities: has 1 for 2 experts"),
        ({"default_threshold": float("nan")}, "default_threshold: is nan"),
        ({"default_threshold": True}, "default_threshold: has the wrong type, bool"),
        ({"hidden_size": 9}, r"theta: has shape \[1, 8\], not \[1, 9\]"),
        ({"base": {"tokens": 3}}, "base.config_sha256: missing or of the wrong type"),
    ],
)
def test_refuses_wrong_fields(saved: Path, changes: dict[str, Any], message: str) -> None:
    fields = json.loads((saved / "gate.json").read_text()) | changes
    (saved / "gate.json").write_text(json.dumps(fields))
    with pytest.raises(GateError, match=message):
        GateArtifact.load(saved)


NAN = torch.full((1, D), float("nan"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"theta": torch.zeros(1, D)}, "bias: missing"),
        ({"bias": torch.zeros(1)}, "theta: missing"),
        ({"theta": torch.zeros(D), "bias": torch.zeros(1)}, r"theta: has shape \[8\]"),
        ({"theta": torch.zeros(1, D), "bias": torch.zeros(2)}, r"bias: has shape \[2\], not \[1\]"),
        ({"theta": torch.zeros(1, D).half(), "bias": torch.zeros(1)}, "theta: is torch.float16"),
        ({"theta": NAN, "bias": torch.zeros(1)}, "theta: has values that are not finite"),
    ],
)
def test_refuses_wrong_tensors(saved: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, str(saved / "gate.safetensors"))
    with pytest.raises(GateError, match=rf"gate\.safetensors: field {message}"):
        GateArtifact.load(saved)


def test_saves_nothing_that_it_would_not_load(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="not finite"):
        make_gate(tmp_path, theta=NAN).save(tmp_path / "gate")
    assert not (tmp_path / "gate").exists()


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            make_gate(tmp_path).save(tmp_path / str(mask))
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in (tmp_path / str(mask)).iterdir()} == {mode}

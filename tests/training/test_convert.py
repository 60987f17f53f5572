"""Conversion to and from the reference format (LM head of V + 1 rows, the last one being theta)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from engine.checkpoints import ModelIdentity, model_identity
from engine.gate import GateArtifact, GateError
from training import convert
from training.checkpoints import forward, load_causal

V, D = 12, 16
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


def make_base(directory: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {chr(97 + i): i for i in range(V)}
    Tokenizer(models.WordLevel(vocabulary, "a")).save(str(directory / "tokenizer.json"))
    return directory


def make_gate(base: Path, directory: Path) -> GateArtifact:
    torch.manual_seed(1)
    gate = GateArtifact(
        theta=torch.randn(1, D),
        bias=torch.zeros(1),
        experts=("codes",),
        base=model_identity(base),
        expert_identities=(None,),
    )
    gate.save(directory)
    return gate


@pytest.mark.parametrize("tied", [False, True])
def test_last_logit_of_the_reference_is_the_gate(tmp_path: Path, tied: bool) -> None:
    base_dir = make_base(tmp_path / "base", tied)
    gate = make_gate(base_dir, tmp_path / "gate")
    convert.to_reference(base_dir, tmp_path / "gate", tmp_path / "reference")
    base, reference = load_causal(base_dir), load_causal(tmp_path / "reference")
    assert reference.config.vocab_size == V + 1
    hidden, logits = forward(base, TOKENS)
    _, joined = forward(reference, TOKENS)
    torch.testing.assert_close(joined[..., :V], logits)
    torch.testing.assert_close(joined[..., V], hidden @ gate.theta[0])


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tmp_path: Path, tied: bool) -> None:
    base_dir = make_base(tmp_path / "base", tied)
    gate = make_gate(base_dir, tmp_path / "gate")
    convert.to_reference(base_dir, tmp_path / "gate", tmp_path / "reference")
    convert.from_reference(tmp_path / "reference", tmp_path / "b", tmp_path / "g", "codes")
    back = GateArtifact.load(tmp_path / "g")
    assert torch.equal(back.theta, gate.theta)
    assert back.experts == ("codes",)
    back.check_fits(tmp_path / "b", ["anywhere"])
    before, after = load_causal(base_dir), load_causal(tmp_path / "b")
    assert torch.equal(forward(before, TOKENS)[1], forward(after, TOKENS)[1])
    modes = {file.stat().st_mode for name in ("b", "g", "reference") for file in (tmp_path / name).iterdir()}
    assert modes == {(tmp_path / "b" / "config.json").stat().st_mode}, "readable by whom the umask lets"
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["vocab_size"] == V


def test_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", tied=False)
    gate = make_gate(base_dir, tmp_path / "gate")
    out = tmp_path / "out"
    replace(gate, bias=torch.ones(1)).save(tmp_path / "biased")
    with pytest.raises(GateError, match="the reference format has no bias, and this gate's is not zero"):
        convert.to_reference(base_dir, tmp_path / "biased", out)
    replace(
        gate,
        theta=torch.zeros(2, D),
        bias=torch.zeros(2),
        experts=("a", "b"),
        expert_identities=(None, None),
    ).save(tmp_path / "two")
    with pytest.raises(GateError, match="the reference format holds one expert, not 2"):
        convert.to_reference(base_dir, tmp_path / "two", out)
    replace(gate, theta=torch.zeros(1, 8)).save(tmp_path / "narrow")
    with pytest.raises(GateError, match="hidden size 8, the base's is 16"):
        convert.to_reference(base_dir, tmp_path / "narrow", out)
    assert not out.exists()


def test_refuses_a_checkpoint_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="cannot be read as a checkpoint"):
        convert.from_reference(tmp_path, tmp_path / "b", tmp_path / "g")
    tied = make_base(tmp_path / "tied", tied=True)
    with pytest.raises(GateError, match=r"no lm_head\.weight: not in the reference format"):
        convert.from_reference(tied, tmp_path / "b", tmp_path / "g")


def test_command_says_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["to-reference", str(tmp_path), str(tmp_path), str(tmp_path / "out")]) == 1
    written = capsys.readouterr().err
    assert written.startswith("error: ")
    assert written.count("\n") == 1


def test_only_a_vector_over_the_hidden_state_goes_into_the_reference_format(tmp_path: Path) -> None:
    identity = ModelIdentity("a", "b", {}, 3)
    gate = GateArtifact(
        torch.zeros(1, 9), torch.zeros(1), ("codes",), identity, (None,), kind="linear", features=("margin",)
    )
    gate.save(tmp_path / "gate")
    with pytest.raises(GateError, match="holds a vector over the hidden state"):
        convert.to_reference(tmp_path / "base", tmp_path / "gate", tmp_path / "out")

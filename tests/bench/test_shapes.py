"""Made-up pairs: they write what was laid down for them, agree as often as was asked for, and cost what they should."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bench import shapes
from bench.shapes import MADE_UP_RATE, SHAPES, Pair, get_pair
from engine.gate import GateArtifact


def written(path: Path, start: int, count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = [start]
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[1:]


@pytest.mark.parametrize("member", [0, 1])
def test_a_made_up_model_follows_its_successors(tiny: Pair, member: int) -> None:
    successors = shapes._successors(tiny.vocab_size, member, 0.0)
    path = (tiny.base, tiny.expert)[member].path
    expected = [successors[5]]
    while len(expected) < 20:
        expected.append(successors[expected[-1]])
    assert written(path, 5, 20) == expected


def test_what_is_written_is_printable_ascii(tiny: Pair) -> None:
    tokenizer = Tokenizer.from_file(str(tiny.base.path / "tokenizer.json"))
    for successor in {*shapes._successors(512, 0, 0.0), *shapes._successors(512, 1, 0.0)}:
        text = tokenizer.decode([successor])
        assert text
        assert text.isascii()
        assert text.isprintable()


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_members_agree_as_often_as_asked(agreement: float) -> None:
    base, expert = shapes._successors(512, 0, agreement), shapes._successors(512, 1, agreement)
    printable = [token for token in range(512) if base.count(base[token]) == 1]
    agreeing = sum(base[token] == expert[token] for token in printable) / len(printable)
    assert agreeing == pytest.approx(agreement, abs=0.08)


@pytest.mark.parametrize(
    ("name", "base", "expert"), [("tiny", 0.56e6, 3.7e6), ("S", 27e6, 219e6), ("1B-8B", 1.5e9, 8.05e9)]
)
def test_sizes(name: str, base: float, expert: float) -> None:
    shape = SHAPES[name]
    assert shape.base.parameters(shape.vocab_size) == pytest.approx(base, rel=0.05)
    assert shape.expert.parameters(shape.vocab_size) == pytest.approx(expert, rel=0.05)


def test_the_checkpoint_has_as_many_weights_as_its_shape_says(tiny: Pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.expert.path)
    shape = SHAPES["tiny"]
    assert sum(weights.numel() for weights in model.parameters()) == shape.expert.parameters(shape.vocab_size)


def test_large_checkpoints_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_SHARD_BYTES", 200_000)
    pair = get_pair("tiny", tmp_path)
    index = json.loads((pair.base.path / "model.safetensors.index.json").read_text())
    files = {file.name for file in pair.base.path.glob("*.safetensors")}
    assert len(files) > 1
    assert set(index["weight_map"].values()) == files
    successors = shapes._successors(512, 0, 0.0)
    assert written(pair.base.path, 7, 2) == [successors[7], successors[successors[7]]]


def test_models_are_made_once(tiny: Pair) -> None:
    config = tiny.base.path / "config.json"
    before = config.stat().st_mtime_ns
    again = get_pair("tiny", tiny.base.path.parents[1], dtype=tiny.dtype)
    assert again == tiny
    assert config.stat().st_mtime_ns == before


def test_the_demo_pair_has_real_prompts(tmp_path: Path) -> None:
    pair = get_pair("demo", tmp_path)
    assert len(pair.prompts) > 100
    assert all(0 <= token < pair.vocab_size for prompt in pair.prompts for token in prompt)


def test_a_made_up_gate_defers_as_often_as_it_says(tiny: Pair) -> None:
    pair = get_pair("tiny", tiny.base.path.parents[1], gated=True)
    assert tiny.gate is None
    assert pair.gate is not None
    gate = GateArtifact.load(pair.gate)
    model = AutoModelForCausalLM.from_pretrained(pair.base.path)
    with torch.no_grad():
        hidden_ND = model.model(torch.tensor(shapes._printable(512)).view(-1, 1)).last_hidden_state[:, 0]
    deferred = (hidden_ND @ gate.theta[0].to(hidden_ND.dtype) + gate.bias[0] > 0).float().mean()
    assert deferred == pytest.approx(MADE_UP_RATE, abs=0.1)


@pytest.mark.parametrize(("units", "dtype"), [("AVX2", "float32"), ("AVX512", "")])
def test_no_type_that_the_processor_is_slow_at(units: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)
    assert shapes.quick_dtype("S") == dtype
    assert shapes.quick_dtype("demo") == ""


def test_unknown_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shape 'huge'"):
        get_pair("huge", tmp_path)

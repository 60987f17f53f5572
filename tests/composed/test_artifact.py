"""A composed checkpoint that is damaged, or whose members are others, is refused by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import model_identity
from engine.composed.artifact import Composition, Connection, Heads, is_composed, make_member
from engine.config import EngineConfig, LaneConfig
from engine.errors import CompositionError, ConfigError
from engine.vllm_hooks.load import make_plan
from engine.vllm_hooks.options import is_large
from tests.composed.checkpoints import LLAMA, compose, save_member
from tests.oracle.pairs import save_tokenizer


@pytest.fixture
def copied(composed: Callable[[str], Path], tmp_path: Path) -> Path:
    """A composition, with its members, that a test may damage."""
    shutil.copytree(composed("llama reads qwen2").parent, tmp_path / "model")
    return tmp_path / "model" / "composed"


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_is_read_as_it_was_written(composed: Callable[[str], Path]) -> None:
    folder = composed("llama reads qwen2")
    found = Composition.load(folder)
    found.check()
    assert found.connections == LLAMA.connections
    assert found.heads == LLAMA.heads
    assert found.anchor.path == folder.parent / "anchor"
    assert [member.name for member in found.augmenting] == ["other"]
    assert is_composed(folder)
    assert not is_composed(folder.parent / "anchor")


def test_moves_with_its_members(copied: Path) -> None:
    Composition.load(copied).check()


def test_a_gate_sees_what_is_computed_but_not_where_it_lies(copied: Path, composed: Callable[[str], Path]) -> None:
    assert model_identity(copied) == model_identity(composed("llama reads qwen2"))
    edit(copied / "config.json", lambda c: c["collm_composition"]["connections"][0].update(layer=2))
    assert model_identity(copied) != model_identity(composed("llama reads qwen2"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("composition.json", lambda c: c.update(format_version=9), "format_version: is 9"),
        ("composition.json", lambda c: c.pop("anchor"), "field anchor: missing"),
        ("composition.json", lambda c: c["augmenting"][0].pop("path"), "field augmenting.0.path: missing"),
        (
            "composition.json",
            lambda c: c["augmenting"][0].update(name="a.b"),
            "augmenting.name: 'a.b' is no identifier",
        ),
        ("config.json", lambda c: c["collm_composition"].update(kv_heads=3), "kv_heads: 3 does not divide heads, 4"),
        ("config.json", lambda c: c["collm_composition"].update(heads=True), "heads: has the wrong type, bool"),
        ("config.json", lambda c: c["collm_composition"]["connections"].clear(), "none reads the augmenting model"),
        (
            "config.json",
            lambda c: c["collm_composition"]["connections"][0].update(layer=4),
            "connections.layer: 4 is not in 1..3",
        ),
        (
            "config.json",
            lambda c: c["collm_composition"]["connections"][0].update(into=0),
            "connections.into: 0 is not in 1..2",
        ),
        (
            "config.json",
            lambda c: c["collm_composition"]["connections"][0].update(augmenting="who"),
            "there is no augmenting model 'who'",
        ),
        (
            "config.json",
            lambda c: c["collm_composition"].update(head_size=64),
            "connections.0.query.weight: has shape [128, 128], not [256, 128]",
        ),
    ],
)
def test_damaged_fields(copied: Path, file: str, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(copied / file, change)
    with pytest.raises(CompositionError) as caught:
        Composition.load(copied)
    assert message in str(caught.value)
    assert str(copied / file) in str(caught.value) or "safetensors" in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"anchor": {}}', '{"anchor": {"path": 1}, "augmenting": []}', "1"])
def test_damaged_files_are_named_where_a_configuration_is_checked(copied: Path, content: str) -> None:
    """Also by what looks at the size of the members before, to choose the number of threads."""
    (copied / "composition.json").write_text(content)
    assert not is_large(str(copied))
    with pytest.raises(ConfigError, match=rf"base\.model: {copied}/composition\.json: "):
        make_plan(EngineConfig(base=LaneConfig(model=str(copied))))


def test_a_member_that_was_moved(copied: Path) -> None:
    (copied.parent / "other").rename(copied.parent / "another")
    with pytest.raises(ConfigError, match=r"augmenting model other is not in .*, where composition.json says"):
        make_plan(EngineConfig(base=LaneConfig(model=str(copied))))


def test_damaged_tensors(copied: Path) -> None:
    file = copied / "composition.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "extra": torch.zeros(1)}, file)
    with pytest.raises(CompositionError, match="field extra: no connection has it"):
        Composition.load(copied)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CompositionError, match="cannot be read as safetensors"):
        Composition.load(copied)
    file.unlink()
    with pytest.raises(CompositionError, match="no such file"):
        Composition.load(copied)


@pytest.mark.parametrize("member", ["anchor", "other"])
def test_another_member(copied: Path, member: str) -> None:
    """Found when a configuration is checked, before anything is loaded, and named as the configuration names it."""
    edit(copied.parent / member / "config.json", lambda c: c.update(num_attention_heads=2))
    with pytest.raises(ConfigError) as caught:
        make_plan(EngineConfig(base=LaneConfig(model=str(copied))))
    message = str(caught.value)
    assert message.startswith("base.model: ")
    assert member in message
    assert "num_attention_heads is 2" in message


def test_another_vocabulary(tmp_path: Path) -> None:
    anchor = save_member(tmp_path / "anchor", "llama", layers=1, width=64, seed=1)
    other = save_member(tmp_path / "other", "llama", layers=1, width=64, seed=2)
    save_tokenizer(other, 511)
    with pytest.raises(
        CompositionError, match="1 entries differ, such as '<filler254>' is 511 in the anchor and absent"
    ):
        compose(
            tmp_path / "composed",
            anchor,
            {"other": other},
            [Connection("other", 1, 1)],
            Heads(2, 2, 32),
            scale=1,
            seed=1,
        )
    assert not (tmp_path / "composed").exists()


def test_members_that_cannot_be_composed(composed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="is itself a composed checkpoint"):
        make_member("other", composed("llama reads qwen2"))
    sliding = save_member(tmp_path / "sliding", "mistral", layers=1, width=64, seed=1, sliding_window=16)
    with pytest.raises(CompositionError, match="sliding window"):
        make_member("other", sliding)
    with pytest.raises(CompositionError, match="no such file"):
        make_member("other", tmp_path / "nowhere")


def test_values_that_are_not_finite_are_not_saved(composed: Callable[[str], Path], tmp_path: Path) -> None:
    found = Composition.load(composed("llama reads qwen2"))
    tensors = {name: torch.full(shape, torch.nan) for name, shape in found.shapes().items()}
    with pytest.raises(CompositionError, match="not float32 and finite"):
        found.save(tmp_path / "new", tensors)
    assert not (tmp_path / "new").exists()

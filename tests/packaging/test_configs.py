"""Every shipped configuration is one that the server takes."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from engine.composed.artifact import Composition
from server.settings import Settings
from tests.packaging.sources import ROOT

CONFIGS = sorted((ROOT / "deploy/config").glob("*.toml"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("COLLM_"):
            monkeypatch.delenv(name)


def test_configs_are_found() -> None:
    assert {"demo.toml", "example-gpu.toml", "example-two-gpus.toml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_valid(path: Path) -> None:
    settings = Settings(config=path)
    assert settings.served_model_name.startswith("collm-")
    assert settings.experts


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_vllm_has_the_options(path: Path) -> None:
    """The pass-through tables, which the settings don't check."""
    arg_utils = pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
    known = {field.name for field in dataclasses.fields(arg_utils.EngineArgs)}
    for lane in Settings(config=path).engine.lanes:
        assert set(lane.vllm) <= known


def test_demo_is_the_shipped_pair() -> None:
    settings = Settings(config=ROOT / "deploy/config/demo.toml")
    assert settings.served_model_name == "collm-demo"
    assert settings.engine.lane_names == ("base", "codes", "arithmetic")
    assert settings.gate.path is not None
    folders = [*(lane.model for lane in settings.engine.lanes), settings.gate.path]
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_smollm_is_an_adapter_of_the_base() -> None:
    settings = Settings(config=ROOT / "deploy/config/smollm.toml")
    assert settings.engine.lane_names == ("base", "icd10")
    assert settings.engine.hosts == (0, 0)
    assert settings.gate.path is not None
    [expert] = settings.experts
    assert expert.adapter is not None
    assert [folder for folder in (expert.adapter, settings.gate.path) if not (ROOT / folder).is_dir()] == []


def test_keys_is_the_shipped_composition() -> None:
    settings = Settings(config=ROOT / "deploy/config/keys.toml")
    assert settings.engine.lane_names == ("base", "anchor", "names")
    composed, *members = (ROOT / lane.model for lane in settings.engine.lanes)
    described = Composition.load(composed)
    assert [described.anchor.path, described.augmenting[0].path] == members


def test_examples_step_as_their_comments_say() -> None:
    one, two = (Settings(config=ROOT / f"deploy/config/example-{name}.toml").engine for name in ("gpu", "two-gpus"))
    assert not one.on_separate_devices
    assert two.on_separate_devices


def test_lanes_of_one_gpu_fit_beside_each_other() -> None:
    lanes = Settings(config=ROOT / "deploy/config/example-gpu.toml").engine.lanes
    assert sum(lane.vllm["gpu_memory_utilization"] for lane in lanes) < 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[scheduler]", "[schedular]"),
        ('name = "codes"', 'name = "base"'),
        ("kv_cache_memory_bytes", "kv_cache_bytes"),
        ("max_num_seqs = 32", "max_num_seqs = 0"),
    ],
)
def test_a_mistake_is_refused(tmp_path: Path, old: str, new: str) -> None:
    text = (ROOT / "deploy/config/demo.toml").read_text()
    assert old in text
    broken = tmp_path / "broken.toml"
    broken.write_text(text.replace(old, new))
    assert tomllib.loads(broken.read_text())
    with pytest.raises(ValidationError):
        Settings(config=broken)

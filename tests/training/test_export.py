"""The configuration of the exported pair is TOML whatever the engine's options are, and one that the engine takes."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from engine.config import EngineConfig
from tests.training.builders import TinyProject
from training.stages import calibrate, export, train

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "hf_overrides": {"rope_scaling": {"type": "linear", "factor": 2.0}, "architectures": ["A", "B"]},
    "compilation_config": {"mode": 3, "passes": {}, "cudagraph_capture_sizes": [1, 2, 4]},
    "served_model_name": '🦙 "quoted" \\ \t\n\x7f ü',
    "limit_mm_per_prompt": {"image": 0, "a key": 1, "ключ": 2},
    "enforce_eager": True,
    "nested": [[{"a": 1}, {"b": [{"c": 2.5}]}], []],
    "tables": [{"a": {"b": 1}}, {"c": [{"d": 2}]}],
}


@pytest.mark.usefixtures("fake_pair")
def test_the_pairs_configuration_has_the_engines_options(tiny: TinyProject) -> None:
    pytest.importorskip("matplotlib")
    tiny.content["engine"] |= {"vllm": OPTIONS, "kv_cache_memory_bytes": 1 << 26}
    project = tiny.project
    for stage in (train, calibrate, export):
        stage.run(project)
    text = project.folder("pair", "collm.toml").read_text(encoding="utf-8")
    config = EngineConfig.model_validate(tomllib.loads(text))
    assert [lane.vllm for lane in config.lanes] == [OPTIONS, OPTIONS]
    assert [lane.model for lane in config.lanes] == [str(tiny.folder / "base"), str(tiny.folder / "expert1")]
    assert {lane.kv_cache_memory_bytes for lane in config.lanes} == {1 << 26}
    assert config.gate.path == str(project.folder("pair", "gate"))

"""The configuration of the exported pair is TOML whatever the engine's options are, and one that the engine takes."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from engine.config import EngineConfig
from tests.training.builders import TinyProject
from training.errors import SettingsError
from training.serving import engine_config
from training.settings import load_settings
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


@pytest.mark.usefixtures("fake_pair")
def test_a_lane_may_differ_from_the_others(tiny: TinyProject) -> None:
    pytest.importorskip("matplotlib")
    tiny.content["engine"] |= {
        "vllm": {"dtype": "float32", "max_model_len": 512},
        "lanes": {
            "e1": {"executor": "mp", "tensor_parallel_size": 2, "devices": [1, 2], "vllm": {"dtype": "bfloat16"}}
        },
    }
    project = tiny.project
    for stage in (train, calibrate, export):
        stage.run(project)
    config = EngineConfig.model_validate(tomllib.loads(project.folder("pair", "collm.toml").read_text()))
    assert (config.base.executor, config.base.tensor_parallel_size) == ("uni", 1)
    expert = config.experts[0]
    assert (expert.executor, expert.tensor_parallel_size, expert.devices) == ("mp", 2, (1, 2))
    assert expert.vllm == {"dtype": "bfloat16", "max_model_len": 512}
    served = engine_config(project.settings.engine, project.base, project.expert_paths, None)
    assert served.experts[0].vllm == expert.vllm
    assert served.experts[0].devices == (1, 2)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"tensor_parallel_size": 2}, "engine, lane 'base': tensor_parallel_size greater than 1 needs executor"),
        ({"lanes": {"e1": {"devices": [0]}}}, "engine, lane 'e1': devices needs executor 'mp'"),
        ({"lanes": {"e2": {"executor": "uni"}}}, "engine.lanes.e2: is neither 'base' nor an expert"),
    ],
)
def test_lanes_that_no_engine_takes_are_found_before_anything_runs(
    tiny: TinyProject, engine: dict[str, Any], message: str
) -> None:
    tiny.content["engine"] |= engine
    with pytest.raises(SettingsError, match=message):
        load_settings(tiny.write())


def test_unknown_options_of_vllm_are_found_before_anything_runs(tiny: TinyProject) -> None:
    pytest.importorskip("vllm")
    tiny.content["engine"] = {"lanes": {"e1": {"vllm": {"max_model_length": 512}}}}
    with pytest.raises(SettingsError, match=r"lane 'e1'\.vllm\.max_model_length: .*did you mean 'max_model_len'"):
        tiny.project.check()
    [file] = (tiny.folder / "out").glob("options-of-vllm-*.json")
    stamp = file.stat().st_mtime_ns
    tiny.content["engine"]["lanes"]["e1"]["vllm"] = {"max_model_len": 512}
    tiny.project.check()
    assert file.stat().st_mtime_ns == stamp

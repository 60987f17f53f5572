"""What the engine's process sets for vLLM, and that it leaves alone what a user has set."""

from __future__ import annotations

import importlib.metadata
import json
import logging.config
import os
import tempfile
from pathlib import Path

import pytest

from engine.config import LaneConfig
from engine.errors import ConfigError
from engine.types import LaneInfo
from engine.vllm_hooks.memory import memory_notes, memory_shares
from engine.vllm_hooks.options import LARGE_BYTES, prepare_environment


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty one, on a machine with four cores and torch's CPU build."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0+cpu")
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    return environment


def lane(**options: object) -> LaneConfig:
    return LaneConfig.model_validate({"model": "x", **options})


def test_one_core_stays_free(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_environment((lane(),))
    assert environment["OMP_NUM_THREADS"] == "3"
    environment.clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    prepare_environment((lane(),))
    assert environment["OMP_NUM_THREADS"] == "1"


def test_on_two_cores_a_large_model_takes_both(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def checkpoint(name: str, *sizes: int) -> LaneConfig:
        directory = tmp_path / name
        directory.mkdir()
        for number, size in enumerate(sizes):
            with (directory / f"model-{number}.safetensors").open("wb") as file:
                file.truncate(size)
        return lane(model=str(directory))

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    small, large = checkpoint("small", LARGE_BYTES - 1), checkpoint("large", LARGE_BYTES - 1, 1)
    prepare_environment((small, small))
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "GOMP_SPINCOUNT" not in environment
    for lanes in ((small, large), (small, lane(model="hub/name"))):
        environment.clear()
        prepare_environment(lanes)
        assert (environment["OMP_NUM_THREADS"], environment["GOMP_SPINCOUNT"]) == ("2", "1000")


def test_on_a_gpu_threads_are_vllm_s_affair(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0")
    prepare_environment((lane(),))
    assert "OMP_NUM_THREADS" not in environment


def test_what_a_user_has_set_stays(environment: dict[str, str]) -> None:
    environment |= {"OMP_NUM_THREADS": "4", "VLLM_LOGGING_LEVEL": "DEBUG"}
    prepare_environment((lane(),))
    assert (environment["OMP_NUM_THREADS"], environment["VLLM_LOGGING_LEVEL"]) == ("4", "DEBUG")


def test_a_late_step_is_for_the_step_loop_to_judge(environment: dict[str, str]) -> None:
    """vLLM's own limit of five minutes would end the engine while the loop still waits for a lost lane."""
    prepare_environment((lane(),))
    assert int(environment["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"]) > 24 * 3600


def test_shards_share_the_cores(environment: dict[str, str]) -> None:
    prepare_environment((lane(), lane(executor="mp", tensor_parallel_size=2)))
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|4,5"


def test_gloo_listens_on_this_machine_only_unless_ray_needs_more(environment: dict[str, str]) -> None:
    prepare_environment((lane(),))
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    environment.clear()
    prepare_environment((lane(executor="ray"),))
    assert "GLOO_SOCKET_IFNAME" not in environment


def test_flashinfers_sampler_needs_nvcc_and_stays_off(environment: dict[str, str]) -> None:
    prepare_environment((lane(),))
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert environment["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] == "1"
    environment["VLLM_USE_FLASHINFER_SAMPLER"] = "1"
    prepare_environment((lane(),))
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "1"


def test_on_a_gpu_vllm_logs_to_a_file(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert prepare_environment((lane(),)) is None
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.32.0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment.clear()
    log = prepare_environment((lane(),))
    assert log is not None
    settings = json.loads(Path(environment["VLLM_LOGGING_CONFIG_PATH"]).read_text())
    assert settings["handlers"]["file"]["filename"] == str(log)
    assert (settings["loggers"]["vllm"]["level"], settings["handlers"]["terminal"]["level"]) == ("INFO", "ERROR")
    logging.config.dictConfig(settings | {"loggers": {"collm-test": settings["loggers"]["vllm"]}})
    logger = logging.getLogger("collm-test")
    logger.info("a line")
    assert log.read_text().endswith("INFO collm-test: a line\n")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    environment.clear()
    environment["VLLM_LOGGING_LEVEL"] = "DEBUG"
    assert prepare_environment((lane(),)) is None


GIB = 1 << 30


def shares(*lanes: LaneConfig, weights: tuple[int, ...], devices: int = 1) -> list[float | None]:
    labels = [f"lane{number}" for number in range(len(lanes))]
    return memory_shares(labels, lanes, [GIB * size for size in weights], dict.fromkeys(range(devices), 80 * GIB))


def test_lanes_on_one_device_share_its_memory() -> None:
    assert shares(lane(), weights=(16,)) == [None]
    assert shares(lane(), lane(), weights=(4, 16)) == pytest.approx([0.184, 0.736])
    stated = shares(lane(kv_cache_memory_bytes=8 * GIB), lane(), weights=(4, 16))
    assert stated == pytest.approx([13.5 / 80, 0.92 - 13.5 / 80], abs=1e-4)
    asked = shares(lane(vllm={"gpu_memory_utilization": 0.3}), lane(), weights=(4, 16))
    assert asked == [None, pytest.approx(0.62)]
    apart = lane(executor="mp", devices=(1,))
    assert shares(lane(), apart, weights=(4, 16), devices=2) == [None, None]
    assert shares(lane(), lane(executor="ray"), weights=(4, 60)) == [None, None]
    with pytest.raises(ConfigError, match="lane1: device 0 has no room for the weights beside the other lanes"):
        shares(lane(kv_cache_memory_bytes=60 * GIB), lane(), weights=(4, 16))


def test_a_cache_for_one_text_per_row_is_not_warned_of() -> None:
    lane = LaneInfo("base", "folder", 100, kv_blocks=30, block_size=10)
    assert memory_notes(lane, 0) == memory_notes(lane, 2) == []
    assert "holds 300 tokens; a text of 100 " in memory_notes(lane, 3)[0]
    assert "to hold 400" in memory_notes(lane, 3)[0]

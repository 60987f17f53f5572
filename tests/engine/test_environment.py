"""What the engine's process sets for vLLM, and that it leaves alone what a user has set."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from engine.config import LaneConfig
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

"""Losses and points of calibration in a tracker."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.builders import TinyProject
from training.__main__ import main


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


@pytest.mark.usefixtures("fake_pair")
def test_tensorboard_has_each_step_and_point(tiny: TinyProject) -> None:
    tiny.content["track"] = {"to": "tensorboard"}
    tiny.content["train"]["mode"] = "joint"
    tiny.content["init"]["steps"] = 4
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    track = tiny.folder / "out" / "track"
    steps = scalars(track / "train" / "collm-0")
    assert [step for step, _ in steps["loss"]] == list(range(6))
    assert set(steps) == {
        "loss",
        *(f"{n}/{g}" for n in ("learning_rate", "gradient_norm") for g in (0, 1)),
    }
    assert steps["learning_rate/0"][0][1] == pytest.approx(1e-3)
    assert len(scalars(track / "init" / "seed-0")["loss"]) == 4
    points = scalars(track / "calibrate" / "collm-0")
    assert {"score", "deferral_rate"} <= set(points)
    assert len(points["score"]) >= 3


def test_wandb_is_offline_unless_told_otherwise(tiny: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def init(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: started.append({"finished": True})
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    tiny.content["track"] = {"to": "wandb", "project": "mine"}
    tiny.content["init"]["steps"] = 3
    assert main(["init", "--config", str(tiny.write())]) == 0
    (options, end) = started
    assert end == {"finished": True}
    assert (options["project"], options["name"], options["id"], options["mode"]) == (
        "mine", "init/seed-0", "init-seed-0", "offline",
    )  # fmt: skip
    assert options["config"]["init"]["steps"] == 3
    assert [step for step, _ in logged] == [0, 1, 2]
    assert all(values["loss"] > 0 for _, values in logged)


def test_a_tracker_that_is_not_installed_is_said_before_anything_runs(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tiny.content["track"] = {"to": "wandb"}
    assert main(["score", "--config", str(tiny.write())]) == 1
    assert 'track.to = "wandb": needs the package wandb: pip install wandb' in capsys.readouterr().err
    assert not (tiny.folder / "out" / "score").exists()

"""What is measured of gates and answers: reliability, intervals, and what an answer cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine.gate import GateArtifact
from tests.training.builders import TinyProject
from training.bootstrap import interval
from training.reliability import calibration_error, reliability
from training.serving import Result
from training.stages import train
from training.stages.calibrate import calibrate_run


def test_reliability_of_a_gate_that_is_right_about_itself() -> None:
    torch.manual_seed(0)
    said = torch.rand(40_000, dtype=torch.float64)
    curve = reliability(said, torch.rand(40_000) < said)
    assert [point["tokens"] for point in curve] == [4000.0] * 10
    assert all(point["needed"] == pytest.approx(point["probability"], abs=0.03) for point in curve)
    assert calibration_error(curve) < 0.02
    overconfident = reliability(torch.where(said > 0.5, 0.99, 0.01), torch.rand(40_000) < said)
    assert calibration_error(overconfident) == pytest.approx(0.24, abs=0.02)


def test_reliability_by_hand() -> None:
    curve = reliability(torch.tensor([0.9, 0.1, 0.2, 0.8]), torch.tensor([True, False, True, True]), bins=2)
    assert curve == [
        {"probability": pytest.approx(0.15), "needed": 0.5, "tokens": 2.0},
        {"probability": pytest.approx(0.85), "needed": 1.0, "tokens": 2.0},
    ]
    assert calibration_error(curve) == pytest.approx((2 * 0.35 + 2 * 0.15) / 4)
    assert len(reliability(torch.tensor([0.5]), torch.tensor([True]))) == 1


def test_the_interval_is_that_of_the_normal_approximation_where_there_are_many_questions() -> None:
    right = (np.arange(2000) % 10 < 7).tolist()
    low, high = interval([right])
    error = 1.96 * (0.7 * 0.3 / 2000) ** 0.5
    assert (low, high) == (pytest.approx(0.7 - error, abs=3e-3), pytest.approx(0.7 + error, abs=3e-3))
    # Seeds that answer the same questions alike tell nothing more about other questions.
    assert interval([right, right]) == (low, high)
    assert interval([right, [not each for each in right]]) == (0.5, 0.5)
    assert interval([[True] * 10]) == (1.0, 1.0)
    # Differences between two ways to answer, question by question.
    assert interval([[each - 1 for each in right]]) == (pytest.approx(low - 1), pytest.approx(high - 1))


@pytest.mark.usefixtures("fake_pair")
def test_the_artifact_has_the_reliability_of_the_calibrated_gate(tiny: TinyProject) -> None:
    project = tiny.project
    train.train_run(project, "collm", 0)
    found = calibrate_run(project, "collm", 0)
    folder = tiny.folder / "out/calibrate/collm-0"
    loaded = GateArtifact.load(folder / "gate")
    assert loaded.reliability == found.reliability
    assert loaded.reliability is not None
    written = json.loads((folder / "curve.json").read_text())
    assert written["reliability"] == loaded.reliability
    assert 0 <= written["calibration_error"] <= 1
    tokens = sum(len(example.completion) for example in project.data("validation").tokens)
    assert sum(point["tokens"] for point in loaded.reliability) == tokens
    assert (folder / "reliability.png").stat().st_size > 1000
    assert loaded.only("e1").reliability is None
    # A file from before there was one.
    fields = json.loads((folder / "gate/gate.json").read_text())
    del fields["reliability"]
    (folder / "gate/gate.json").write_text(json.dumps(fields))
    assert GateArtifact.load(folder / "gate").reliability is None


def test_results_from_before_seconds_were_counted_are_read() -> None:
    assert Result.from_json({"seconds": 2.0, "answers": []}) == Result([], 2.0)
    counted = Result([], 2.0, 1.0, 1.5)
    assert Result.from_json(counted.to_json()) == counted


def test_layers_that_are_computed_twice_learn_the_same(tiny: TinyProject) -> None:
    tiny.content["train"]["mode"] = "joint"
    found = []
    for checkpointing in (False, True):
        tiny.content["out"] = str(tiny.folder / f"out{checkpointing}")
        tiny.content["train"]["joint"]["gradient_checkpointing"] = checkpointing
        run = train.train_run(tiny.project, "collm", 0)
        found.append(GateArtifact.load(run / "gate").theta)
    torch.testing.assert_close(found[0], found[1])

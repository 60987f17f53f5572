"""A gate that is there gets a new curve, and stays what it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.gate import FIELDS_FILE, TENSORS_FILE, GateArtifact
from tests.training.builders import FakePair, TinyProject
from training.__main__ import main
from training.serving import Result
from training.stages import train
from training.thresholds import LOG_ODDS, log_odds, probability

pytest.importorskip("matplotlib")


def old_gate(tiny: TinyProject) -> Path:
    """A gate without ends and costs in its curve, as earlier versions wrote them."""
    folder = tiny.folder / "old"
    trained = GateArtifact.load(train.train_run(tiny.project, "collm", 0) / "gate")
    curve = [{"nominal_rate": 0.5, "threshold": 0.4, "score": 0.1, "deferral_rate": 0.5}]
    replace(trained, default_threshold=0.4375, calibration=curve).save(folder)
    return folder


@pytest.mark.usefixtures("fake_pair")
def test_the_curve_is_measured_anew_and_the_gate_stays(tiny: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = old_gate(tiny), tiny.folder / "new"
    config = str(tiny.write())
    assert main(["recalibrate", "--config", config, "--gate", str(old), "--to", str(new)]) == 0
    assert "the default threshold, 0.4375, stays" in capsys.readouterr().out
    assert (new / TENSORS_FILE).read_bytes() == (old / TENSORS_FILE).read_bytes()
    before, after = (json.loads((folder / FIELDS_FILE).read_text()) for folder in (old, new))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"calibration", "reliability"}
    gate = GateArtifact.load(new)
    costs, shares = gate.measured("expert_seconds_per_token"), dict(gate.measured("deferral_rate"))
    assert len(costs) == len(shares) >= 5, "three rates, both ends and the default threshold"
    assert any(at == pytest.approx(0.4375) for at in shares)
    assert list(shares) == sorted(shares, reverse=True)
    # In place: the same gate, again.
    assert main(["recalibrate", "--config", config, "--gate", str(new)]) == 0
    assert (new / TENSORS_FILE).read_bytes() == (old / TENSORS_FILE).read_bytes()


@pytest.mark.usefixtures("fake_pair")
def test_nothing_is_trained_for_it(tiny: TinyProject) -> None:
    old = old_gate(tiny)
    tiny.content["out"] = str(tiny.folder / "elsewhere")
    assert main(["recalibrate", "--config", str(tiny.write()), "--gate", str(old)]) == 0
    assert {path.name for path in (tiny.folder / "elsewhere").iterdir() if path.is_dir()} == {"score", "recalibrate"}


@pytest.mark.usefixtures("fake_pair")
def test_the_least_of_several_times_counts(tiny: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that takes the machine's time for one set makes no point of the curve dearer."""
    old = old_gate(tiny)
    config = str(tiny.write())
    assert main(["recalibrate", "--config", config, "--gate", str(old), "--to", str(tiny.folder / "once")]) == 0
    answer, calls = FakePair.answer, 0

    def disturbed(self: FakePair, *args: Any, **how: Any) -> Result:
        nonlocal calls
        calls += 1
        found = answer(self, *args, **how)
        return replace(found, expert_seconds=found.expert_seconds * 10) if calls % 3 == 1 else found

    monkeypatch.setattr(FakePair, "answer", disturbed)
    tiny.content["out"] = str(tiny.folder / "again")
    config = str(tiny.write())
    assert main(["recalibrate", "--config", config, "--gate", str(old), "--to", str(tiny.folder / "twice")]) == 0
    assert calls > 6
    once, twice = (GateArtifact.load(tiny.folder / name) for name in ("once", "twice"))
    assert twice.measured("expert_seconds_per_token") == once.measured("expert_seconds_per_token")


def test_a_gate_of_other_models_is_refused(tiny: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    old = old_gate(tiny)
    tiny.content["experts"][0]["name"] = "other"
    assert main(["recalibrate", "--config", str(tiny.write()), "--gate", str(old)]) == 1
    assert "the gate is for the experts e1, in this order, and the project has other" in capsys.readouterr().err
    assert main(["recalibrate", "--config", str(tiny.write()), "--gate", str(tiny.folder / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("threshold", [0.0, 1e-12, 0.3, 0.5, 1 - 1e-9])
def test_log_odds_are_those_of_the_probability(threshold: float) -> None:
    assert probability(log_odds(threshold)) == pytest.approx(threshold, rel=1e-9, abs=3e-16)


def test_thresholds_that_are_no_probability_have_log_odds() -> None:
    assert (log_odds(1.0), log_odds(-1.0)) == (math.inf, -math.inf)
    assert log_odds(0.0) == LOG_ODDS.least

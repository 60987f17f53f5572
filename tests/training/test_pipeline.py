"""Whole pipelines on tiny models, with the stand-in engine; resuming; what the stages leave behind."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.gate import GateArtifact
from tests.training.builders import EXPERT_SECONDS, TinyProject, write_jsonl
from training.__main__ import main
from training.checkpoints import forward, load_causal
from training.errors import DivergedError
from training.fit import CHECKPOINT, Group, Plan, fit
from training.gate_only import Gate
from training.project import Project
from training.report import ORACLE, table
from training.serving import Answer, Result
from training.stages import calibrate, init, train
from training.stages.score import score_split
from training.thresholds import Point, choose, interpolate, quantile, reach, refine

pytest.importorskip("matplotlib")
CPU = torch.device("cpu")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(str(file)).items()
    }


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_scores_are_the_models_own(tiny: TinyProject) -> None:
    """Whatever the batches: log P(gold) over the real vocabulary, the argmax, and the LM head's input."""
    project = tiny.project
    scores = score_split(project, "train")
    base = load_causal(project.base, "float32", CPU)
    expert = load_causal(project.expert_paths["e1"], "float32", CPU)
    row = 0
    for example in project.data("train").tokens:
        ids = example.prompt + example.completion
        with torch.no_grad():
            hidden_BTD, logits_BTV = forward(base, torch.tensor([ids]))
            _, expert_BTV = forward(expert, torch.tensor([ids]))
        for at, gold in enumerate(example.completion, start=len(example.prompt) - 1):
            torch.testing.assert_close(scores.hidden_ND[row], hidden_BTD[0, at])
            expected = torch.log_softmax(logits_BTV[0, at, :257], -1)[gold]
            torch.testing.assert_close(scores.base.logp_N[row], expected)
            assert scores.experts[0].top_N[row] == expert_BTV[0, at, :257].argmax()
            assert scores.gold_N[row] == gold
            row += 1
    assert row == len(scores.gold_N) == scores.starts[-1]


@pytest.mark.parametrize(("mode", "experts"), [("gate", 2), ("joint", 1)])
def test_pipeline(tmp_path: Path, mode: str, experts: int, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = TinyProject.make(tmp_path, experts)
    tiny.content["train"] |= {"mode": mode, "methods": ["collm", "weak", "finetuned"]}
    config = str(tiny.write())
    assert main(["pipeline", "--config", config]) == 0
    out = tmp_path / "out"
    gate = GateArtifact.load(out / "pair" / "gate")
    assert gate.theta.shape == (experts, 16)
    assert gate.experts == tuple(f"e{n}" for n in range(1, experts + 1))
    assert gate.calibration is not None
    assert {0.0, 0.5, 1.0} <= {point["nominal_rate"] for point in gate.calibration}
    chosen = json.loads((out / "calibrate" / "collm-0" / "done.json").read_text())
    assert gate.default_threshold == chosen["threshold"]
    assert chosen["score"] == max(point["score"] for point in gate.calibration)
    base = out / "pair" / "base" if mode == "joint" else tmp_path / "base"
    gate.check_fits(base, [tmp_path / f"expert{n}" for n in range(1, experts + 1)])
    assert (out / "pair" / "base").is_dir() == (mode == "joint")
    weights = [*(out / "pair").rglob("*.safetensors")]
    assert {file.stat().st_mode for file in weights} == {(out / "pair" / "collm.toml").stat().st_mode}
    served = tomllib.loads((out / "pair" / "collm.toml").read_text())
    assert served["base"]["model"] == str(base)
    assert [expert["name"] for expert in served["experts"]] == list(gate.experts)
    for file in ("calibrate/collm-0/curve.png", "calibrate/collm-0/curve.json", "evaluate/curves.png"):
        assert (out / file).stat().st_size > 100
    found = json.loads((out / "evaluate" / "table.json").read_text())
    assert {"base alone", "e1 alone", "fine-tuned base", "Co-LLM", "weakly supervised", ORACLE} <= found["rows"].keys()
    assert found["rows"]["base alone"]["0"]["deferral_rate"] == 0
    assert found["rows"]["e1 alone"]["0"]["deferral_rate"] == 1
    assert "| Co-LLM | 1 |" in (out / "evaluate" / "table.md").read_text()
    for stage in ("score/train/base", "init/seed-0", "train/weak-0", "calibrate/collm-0", "evaluate"):
        assert json.loads((out / stage / "settings.json").read_text())["settings"]
        assert (out / stage / "done.json").exists()
    capsys.readouterr()
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors") if "pair" not in file.parts}
    stamps = {file: stamp for file, stamp in stamps.items() if "calibrate" not in file.parts}
    assert main(["pipeline", "--config", config]) == 0
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert "engine" not in capsys.readouterr().err


def test_the_same_seed_gives_the_same_gate_and_another_another(tmp_path: Path) -> None:
    gates = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny = TinyProject.make(tmp_path / name)
        tiny.content["seeds"] = [seed]
        tiny.content["init"]["batch_tokens"] = 40  # else no order is drawn, and this is the gate that training keeps
        gates.append(GateArtifact.load(train.train_run(tiny.project, "collm", seed) / "gate").theta)
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("mode", ["gate", "joint"])
def test_training_that_was_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    projects: list[Project] = []
    for name in ("whole", "interrupted"):
        tiny = TinyProject.make(tmp_path / name)
        tiny.content["train"] |= {"mode": mode}
        projects.append(tiny.project)
    whole, interrupted = projects
    expected = tensors(train.train_run(whole, "collm", 0))
    init.initial_gate(interrupted, 0)
    step, calls = torch.optim.AdamW.step, iter(range(1000))

    def stop_at_the_fourth(self: torch.optim.AdamW, *args: Any) -> Any:
        if next(calls) == 3:
            raise Stopped
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", stop_at_the_fourth)
        with pytest.raises(Stopped):
            train.train_run(interrupted, "collm", 0)
    assert (interrupted.run("collm", 0) / CHECKPOINT).exists()
    assert_same(tensors(train.train_run(interrupted, "collm", 0)), expected)


def test_scoring_and_calibration_go_on_where_they_were(tiny: TinyProject) -> None:
    project = tiny.project
    before = score_split(project, "train")
    folder = project.folder("score", "train", "base")
    (folder / "done.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    stamp = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert torch.equal(score_split(project, "train").hidden_ND, before.hidden_ND)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == stamp

    train.run(project)
    calibrate.run(project)
    folder = project.folder("calibrate", "collm-0")
    kept = next(p for p in json.loads((folder / "curve.json").read_text())["points"] if p["nominal_rate"] == 0.5)
    for file in (folder / "answers").iterdir():
        content = json.loads(file.read_text())
        if content["how"].get("threshold") == kept["threshold"]:
            right = content["answers"][0] | {"text": content["answers"][0]["gold"], "ended": True}
            file.write_text(json.dumps(content | {"answers": [right, *[content["answers"][1]] * 7]}))
        elif content["how"]["policy"] != "never":
            file.unlink()
    gate = calibrate.calibrate_run(project, "collm", 0)
    assert gate.calibration is not None
    by_rate = {point["nominal_rate"]: point["score"] for point in gate.calibration}
    assert (by_rate[0.0], by_rate[0.5], by_rate[1.0]) == (0.0, 0.125, 0.0)
    # What was tried beside the best point scored less, so the best point itself is served.
    assert gate.default_threshold == kept["threshold"]


@pytest.mark.usefixtures("fake_pair")
def test_a_curve_says_what_experts_cost(tiny: TinyProject) -> None:
    project = tiny.project
    train.run(project)
    gate = calibrate.calibrate_run(project, "collm", 0)
    rates = dict(gate.measured("deferral_rate"))
    costs = gate.measured("expert_seconds_per_token")
    assert len(costs) == len(rates) > 2
    assert {at: cost / EXPERT_SECONDS for at, cost in costs} == pytest.approx(rates)
    # Answers that an earlier version kept do not say.
    for file in project.folder("calibrate", "collm-0", "answers").iterdir():
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({name: kept[name] for name in kept if not name.endswith("_seconds")}))
    assert calibrate.calibrate_run(project, "collm", 0).measured("expert_seconds_per_token") == []


@pytest.mark.usefixtures("fake_pair")
def test_a_curve_has_the_gate_s_greatest_and_least_value(tiny: TinyProject) -> None:
    """Without them, nothing says where shares below the first measured rate begin, and those above the last end."""
    tiny.content["calibrate"] |= {"rates": [0.0, 0.5, 1.0], "refine": 0}
    project = tiny.project
    train.run(project)
    gate = calibrate.calibrate_run(project, "collm", 0)
    observed_N = Gate.of(gate).log_odds_of(score_split(project, "validation").base)
    thresholds = [threshold for threshold, _ in gate.measured("deferral_rate")]
    for value in (observed_N.max(), observed_N.min()):
        assert any(threshold == pytest.approx(float(value.sigmoid()), abs=1e-12) for threshold in thresholds)


def test_changed_settings_make_a_stage_step_aside_and_come_back(
    tiny: TinyProject, capsys: pytest.CaptureFixture[str]
) -> None:
    first = init.initial_gate(tiny.project, 0)
    tiny.content["init"] = {"steps": 5}
    assert not torch.equal(init.initial_gate(tiny.project, 0).theta_KD, first.theta_KD)
    assert "which is kept in" in capsys.readouterr().out
    tiny.content["init"] = {"steps": 20}
    assert torch.equal(init.initial_gate(tiny.project, 0).theta_KD, first.theta_KD)
    write_jsonl(tiny.folder / "train.jsonl", [{"prompt": "new", "completion": " data"}])
    assert len(score_split(tiny.project, "train").gold_N) == 6


def test_lora_is_merged_into_a_plain_checkpoint(tiny: TinyProject) -> None:
    pytest.importorskip("peft")
    tiny.content["train"] |= {"mode": "joint"}
    tiny.content["train"]["joint"]["lora"] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    run = train.train_run(tiny.project, "collm", 0)
    trained, base = (load_file(str(path / "model.safetensors")) for path in (run / "base", tiny.folder / "base"))
    assert trained.keys() == base.keys()
    changed = {name.split(".")[-2] for name, tensor in base.items() if not torch.equal(tensor, trained[name])}
    assert changed == {"q_proj", "v_proj"}


def test_fit_defers_what_only_the_expert_knows(tiny: TinyProject) -> None:
    """Where the base is hopeless and the expert sure, or the other way round, and the hidden state tells which."""
    from training.gate_only import GateFit, fit_gate
    from training.losses import marginal
    from training.scoring import ModelScores, PairScores

    torch.manual_seed(0)
    hidden = torch.randn(300, 4)
    needed = hidden[:, 1] > 0
    good, bad = torch.tensor(-0.1), torch.tensor(-6.0)
    gold = torch.ones(300, dtype=torch.long)
    base = ModelScores(torch.where(needed, bad, good), torch.where(needed, 0, 1), hidden)
    expert = ModelScores(torch.where(needed, good, bad), torch.where(needed, 1, 0), None)
    scores = PairScores(gold, [0, 300], base, (expert,))
    assert torch.equal(scores.weak_labels() > 0, needed)
    fitting = GateFit(0.1, 0.0, 64, Plan(100, 0.1, 50), 1.0, False, 0)
    start = Gate(torch.zeros(1, 4), torch.zeros(1))
    gate = fit_gate(scores, start, marginal, fitting, tiny.folder / "fit", "fit", CPU)
    assert ((gate.deferral(hidden) > 0.5) == needed).float().mean() > 0.95


def test_fit_keeps_nothing_of_a_step_that_is_not_a_number(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))

    def parts(step: int) -> list[torch.Tensor]:
        return [parameter.sum() * (float("nan") if step == 5 else 1.0)]

    with pytest.raises(DivergedError, match="the loss is nan at step 5; the checkpoint of step 4 is kept"):
        fit([Group({"p": parameter}, 0.1, 0.0)], parts, Plan(10, 0.0, 2), tmp_path, "toy")
    assert parameter.isfinite().all()


def test_fit_stops_at_a_gradient_that_is_not_a_number(tmp_path: Path) -> None:
    """The square root of 0 is finite, its gradient is not. The checkpoint that is kept is one to go on from."""
    parameter = torch.nn.Parameter(torch.ones(2))

    def parts(step: int) -> list[torch.Tensor]:
        return [(parameter * 0).sqrt().sum() if step == 5 else parameter.sum()]

    with pytest.raises(DivergedError, match="the gradient's norm is nan at step 5; the checkpoint of step 4 is kept"):
        fit([Group({"p": parameter}, 0.1, 0.0)], parts, Plan(10, 0.0, 2), tmp_path, "toy")
    assert load_file(str(tmp_path / CHECKPOINT))["parameter p"].isfinite().all()


def test_fit_keeps_no_checkpoint_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    """The third step, too long, takes the parameter to where there is no logarithm."""
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(DivergedError, match="the loss is nan at step 3; the checkpoint of step 2 is kept"):
        fit([Group({"p": parameter}, 0.4, 0.0)], lambda _: [parameter.log().sum()], Plan(10, 0.0, 1), tmp_path, "toy")
    assert load_file(str(tmp_path / CHECKPOINT))["parameter p"] > 0


def test_quantiles_and_interpolation() -> None:
    observed = torch.linspace(0, 1, 101)
    assert quantile(observed, 0.0) == 1.0
    assert quantile(observed, 1.0) == -1.0
    for rate in (0.1, 0.5):
        assert quantile(observed, rate) == pytest.approx(1 - rate)
    points = [
        Point(rate, threshold, 0.0, rate) for threshold, rate in ((1.0, 0.0), (0.6, 0.2), (0.2, 0.4), (-1.0, 1.0))
    ]
    assert interpolate(points, 0.3) == pytest.approx(0.4)
    assert interpolate(points, 0.2) == pytest.approx(0.6)
    assert interpolate(points[1:3], 0.9) == 0.2
    assert reach(points, 0.3, lambda threshold: Point(0.3, threshold, 0.0, 0.31)).deferral_rate == 0.31
    assert reach(points, 0.3, lambda threshold: Point(0.3, threshold, 0.0, 0.9)).deferral_rate in (0.2, 0.4)


def curve(thresholds: list[float], score: Callable[[float], float]) -> list[Point]:
    return [Point(0.0, threshold, score(threshold), 1 - threshold) for threshold in thresholds]


def test_the_threshold_stays_where_the_score_is_the_best() -> None:
    """A curve as the weakly supervised gate had it: the best score at a small threshold, then a wide empty gap."""
    observed = torch.tensor([0.01, 0.02, 0.03, 0.034, 0.036, 0.04, 0.95, 0.97])

    def score(threshold: float) -> float:
        return 0.9 if 0.02 <= threshold < 0.05 else 0.6

    chosen = choose(curve([1.0, 0.96, 0.035, 0.015, -1.0], score), observed, lambda t: curve([t], score)[0])
    assert chosen.score == 0.9
    assert 0.034 < chosen.threshold < 0.036


def test_the_threshold_is_in_the_widest_gap_of_the_best_range_if_that_scores_as_well() -> None:
    observed = torch.tensor([0.01, 0.3, 0.35, 0.7, 0.75, 0.99])
    points = curve([1.0, 0.8, 0.32, 0.2, -1.0], lambda t: 0.9 if 0.3 < t < 0.9 else 0.1)
    tried: list[float] = []

    def decode(result: float) -> Callable[[float], Point]:
        def measure(threshold: float) -> Point:
            tried.append(threshold)
            return Point(0.5, threshold, result, 0.5)

        return measure

    assert choose(points, observed, decode(0.9)).threshold == pytest.approx((0.35 + 0.7) / 2)
    # What the sweep did not see: in the middle of the range it is worse.
    assert choose(points, observed, decode(0.5)) == points[1]
    assert tried == [pytest.approx(0.525)] * 2


@pytest.mark.parametrize(("best", "around"), [(-1.0, (0.0, 0.3)), (1.0, (0.7, 1.0))])
def test_what_is_tried_is_a_threshold_also_where_one_model_alone_is_best(
    best: float, around: tuple[float, float]
) -> None:
    points = curve([1.0, 0.5, -1.0], lambda threshold: 0.9 if threshold == best else 0.1)
    chosen = choose(points, torch.tensor([0.3, 0.7]), lambda threshold: Point(0.5, threshold, 0.9, 0.5))
    assert chosen.threshold == pytest.approx(sum(around) / 2)


def test_the_longest_of_several_best_ranges_is_taken() -> None:
    points = curve([0.9, 0.7, 0.5, 0.4, 0.2], lambda t: {0.9: 0.8, 0.7: 0.1}.get(t, 0.8 if t > 0.3 else 0.0))
    assert 0.4 < choose(points, torch.linspace(0, 1, 11), lambda t: Point(0.5, t, 0.8, 0.5)).threshold < 0.5


def test_rates_between_the_points_of_the_sweep_are_found() -> None:
    """A sure gate: all that counts happens between the rates 0.2 and 0.25."""

    def decode(rate: float) -> Point:
        return Point(rate, 1 - rate, 0.98 if 0.21 < rate < 0.22 else 0.8 if 0.2 <= rate <= 0.25 else 0.1, rate)

    swept = [decode(rate) for rate in (0.0, 0.1, 0.2, 0.25, 0.3, 1.0)]
    assert max(point.score for point in refine(swept, 0, decode)) == 0.8
    found = refine(swept, 3, decode)
    assert len(found) == len(swept) + 6
    assert max(point.score for point in found) == 0.98
    assert len(refine(swept[:1], 2, decode)) == 1


def test_results_and_table() -> None:
    answers = [Answer("a", " x", " x", True, [0, 1]), Answer("b", " x", " x", False, [0, 2])]
    result = Result(answers, 2.0)
    assert (result.score, result.deferral_rate, result.tokens, result.expert_tokens) == (0.5, 0.5, 4, 2)
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    other = result.summary() | {"exact_match": 0.7}
    text = table({"Co-LLM": {0: result.summary(), 1: other}})
    assert "| Co-LLM | 2 | 0.600 ± 0.200 | - | 0.500 ± 0.000 | 2 ± 0 | - | 2 ± 0 | - |" in text
    known = result.summary() | {"right": [True, False], "expert_seconds": 1.25, "lane_seconds": 2.0}
    assert "| Co-LLM | 1 | 0.500 | 0.000 to 1.000 | 0.500 | 2 | 1.25 | 2 | - |" in table({"Co-LLM": {0: known}})
    assert "| exact match by task | Co-LLM |\n| --- | ---: |\n| a | 1.000 ± 0.000 |\n| b | 0.000 ± 0.000 |" in text
    assert result.summary()["rate_by_task"] == {"a": 0.5, "b": 0.5}

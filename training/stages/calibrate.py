"""Calibrate: decode the validation questions at a sweep of thresholds, on the serving engine, and choose one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from engine.gate import GateArtifact
from training.data import spread
from training.files import StageFolder, read_json, write_json
from training.gate_only import Gate
from training.plots import plot_scores
from training.project import Project
from training.serving import Pair, Questions, Result, engine_config
from training.settings import Method, Split
from training.stages import score
from training.stages.train import need_run
from training.thresholds import Point, choose, quantile, reach, refine


@dataclass(frozen=True)
class MeasuredPoint(Point):
    """A point with its cost on the engine: ``seconds`` for all questions together."""

    seconds: float
    tokens_per_second: float


def run(project: Project) -> None:
    """Calibrate the gate of every run that has one."""
    for seed in project.settings.seeds:
        for method in project.settings.train.methods:
            if method != "finetuned":
                need_run(project, method, seed)
                calibrate_run(project, method, seed)


def folder_of(project: Project, method: Method, seed: int) -> Path:
    """Where a run's calibration is: ``gate/``, ``curve.json`` and ``curve.png``."""
    return project.folder("calibrate", f"{method}-{seed}")


def stage_of(project: Project, method: Method, seed: int) -> StageFolder:
    """The calibration of a run. A wished rate is no part of what it is: the points are the same for all."""
    settings, trained = project.settings, project.run(method, seed)
    resolved = {
        "calibrate": settings.calibrate.model_dump(exclude={"target_rate"}),
        "engine": settings.engine.model_dump(),
        "room": settings.evaluate.room,
    }
    inputs = {
        # No expert can have the names with a space.
        "trained gate": project.hash_of(trained / "gate"),
        "validation scores": score.stage_of(project, "validation", "base", trained).fingerprint,
        **{name: project.hash_of(path) for name, path in project.expert_paths.items()},
    }
    return StageFolder(folder_of(project, method, seed), resolved, inputs)


def calibrate_run(project: Project, method: Method, seed: int) -> GateArtifact:
    """The calibrated gate of a run."""
    settings, trained = project.settings, project.run(method, seed)
    stage = stage_of(project, method, seed).open()
    folder = stage.path
    artifact = GateArtifact.load(trained / "gate")
    hidden_ND = score.score_base(project, "validation", trained).hidden_ND
    assert hidden_ND is not None
    observed_N = Gate(artifact.theta, artifact.bias).deferral(hidden_ND)
    target = settings.calibrate.target_rate
    with _Decoder(project, method, seed, observed_N) as decoder:
        points = [decoder.at_rate(rate) for rate in settings.calibrate.rates]
        if target is None:
            points = refine(points, settings.calibrate.refine, decoder.at_rate)
            chosen = choose(points, observed_N, decoder.at_threshold)
        else:
            chosen = reach(points, target, decoder.at_threshold)
    threshold = min(1.0, max(0.0, chosen.threshold))
    points = sorted({point.threshold: point for point in [*points, chosen]}.values(), key=lambda p: -p.threshold)
    calibrated = replace(artifact, default_threshold=threshold, calibration=[asdict(point) for point in points])
    calibrated.save(folder / "gate")
    write_json(
        folder / "curve.json",
        {"threshold": threshold, "target_rate": target, "points": [asdict(point) for point in points]},
    )
    plot_scores(
        folder / "curve.png",
        {f"{method}, validation": [(point.deferral_rate, point.score) for point in points]},
        {f"threshold {threshold:.4f}": (chosen.deferral_rate, chosen.score)},
    )
    stage.finish(threshold=threshold, score=chosen.score, deferral_rate=chosen.deferral_rate)
    print(f"{folder}: threshold {threshold:.4f}: score {chosen.score:.3f} at a rate of {chosen.deferral_rate:.3f}")
    return calibrated


def numbers_of(project: Project, split: Split, limit: int | None) -> list[int]:
    """Numbers of those of the split's examples that are asked."""
    return spread(range(len(project.data(split).examples)), limit)


def questions_of(project: Project, split: Split, limit: int | None) -> Questions:
    """The split's examples as questions."""
    data, numbers = project.data(split), numbers_of(project, split, limit)
    return Questions(
        [data.examples[number] for number in numbers],
        [data.tokens[number] for number in numbers],
        project.settings.evaluate.room,
    )


def decode(pair: Pair, questions: Questions, threshold: float, label: str) -> Result:
    """Decode at a threshold; those that no probability reaches are policies of their own."""
    if threshold < 0:
        return pair.answer(questions, label, policy="always")
    return pair.answer(questions, label, policy="never" if threshold >= 1 else "threshold", threshold=threshold)


class _Decoder:
    """Measures thresholds: those that ``points.json`` lacks, on an engine that starts for the first of them."""

    def __init__(self, project: Project, method: Method, seed: int, observed_N: torch.Tensor) -> None:
        self._project = project
        self._label = f"calibrate {method}-{seed}"
        self._observed_N = observed_N
        self._base = project.base_of(method, seed)
        self._gate = project.run(method, seed) / "gate"
        self._file = folder_of(project, method, seed) / "points.json"
        found = read_json(self._file) if self._file.exists() else []
        self._points = {point["threshold"]: MeasuredPoint(**point) for point in found}
        self._questions = questions_of(project, "validation", project.settings.calibrate.limit)
        self._pair: Pair | None = None

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pair is not None:
            self._pair.__exit__(None, None, None)

    def at_rate(self, rate: float) -> MeasuredPoint:
        """The point of a nominal rate."""
        return self._measured(quantile(self._observed_N, rate), rate)

    def at_threshold(self, threshold: float) -> MeasuredPoint:
        """The point of a threshold."""
        return self._measured(threshold, float((self._observed_N > threshold).double().mean()))

    def _measured(self, threshold: float, rate: float) -> MeasuredPoint:
        if threshold not in self._points:
            if self._pair is None:
                project = self._project
                config = engine_config(project.settings.engine, self._base, project.expert_paths, self._gate)
                self._pair = Pair(config, project.tokenizer)
            result = decode(self._pair, self._questions, threshold, f"{self._label} at {threshold:.4f}")
            self._points[threshold] = MeasuredPoint(
                nominal_rate=rate,
                threshold=threshold,
                score=result.score,
                deferral_rate=result.deferral_rate,
                seconds=result.seconds,
                tokens_per_second=result.tokens / result.seconds,
            )
            write_json(self._file, [asdict(point) for point in self._points.values()])
        return self._points[threshold]

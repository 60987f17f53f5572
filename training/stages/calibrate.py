"""Calibrate: decode the validation questions at a sweep of thresholds, on the serving engine, and choose one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from engine.gate import GateArtifact
from training.calibrate import Point, choose
from training.data import spread
from training.files import StageFolder, hash_of_path, read_json, write_json
from training.gate_only import Gate
from training.plots import plot_scores
from training.project import Project
from training.serving import Pair, Questions, Result, engine_config
from training.settings import Method, Split
from training.stages.score import score_base


@dataclass(frozen=True)
class MeasuredPoint(Point):
    """A point of the sweep with its cost on the engine: ``seconds`` for all questions together."""

    seconds: float
    tokens_per_second: float


def run(project: Project) -> None:
    """Calibrate the gate of every run that has one."""
    for seed in project.settings.seeds:
        for method in project.settings.train.methods:
            if method != "finetuned":
                project.need(project.run(method, seed), "train")
                calibrate_run(project, method, seed)


def folder_of(project: Project, method: Method, seed: int) -> Path:
    """Where a run's calibration is: ``gate/``, ``curve.json`` and ``curve.png``."""
    return project.folder("calibrate", f"{method}-{seed}")


def calibrate_run(project: Project, method: Method, seed: int) -> GateArtifact:
    """The calibrated gate of a run."""
    settings, trained = project.settings, project.run(method, seed)
    folder = folder_of(project, method, seed)
    resolved = {
        "calibrate": settings.calibrate.model_dump(exclude={"target_rate"}),
        "engine": settings.engine.model_dump(),
        "room": settings.evaluate.room,
    }
    inputs = {
        "run": hash_of_path(trained / "gate"),
        "base": hash_of_path(project.base_of(method, seed)),
        "validation": project.data("validation").fingerprint,
        **{name: project.fingerprints[name] for name in project.expert_paths},
    }
    stage = StageFolder.open(folder, resolved, inputs)
    artifact = GateArtifact.load(trained / "gate")
    hidden_ND = score_base(project, "validation", trained).hidden_ND
    assert hidden_ND is not None
    observed_N = Gate(artifact.theta, artifact.bias).deferral(hidden_ND)
    points = _sweep(project, method, seed, observed_N, folder, trained)
    threshold, chosen = _choose(points, observed_N, settings.calibrate.target_rate)
    calibrated = replace(artifact, default_threshold=threshold, calibration=[asdict(point) for point in points])
    calibrated.save(folder / "gate")
    write_json(
        folder / "curve.json",
        {"threshold": threshold, "target_rate": settings.calibrate.target_rate, "points": [asdict(p) for p in points]},
    )
    plot_scores(
        folder / "curve.png",
        {f"{method}, validation": [(point.deferral_rate, point.score) for point in points]},
        {f"threshold {threshold:.4f}": (chosen.deferral_rate, chosen.score)},
    )
    stage.finish(threshold=threshold)
    print(f"{folder}: threshold {threshold:.4f} (near it: score {chosen.score:.3f} at rate {chosen.deferral_rate:.3f})")
    return calibrated


def questions_of(project: Project, split: Split, limit: int | None) -> Questions:
    """The split's examples as questions."""
    data = project.data(split)
    numbers = spread(range(len(data.examples)), limit)
    return Questions(
        [data.examples[number] for number in numbers],
        [data.tokens[number] for number in numbers],
        project.settings.evaluate.room,
    )


def quantile(observed_N: torch.Tensor, rate: float) -> float:
    """A threshold that a share ``rate`` of the observed probabilities exceed, in [0, 1]."""
    if rate <= 0:
        return 1.0
    # numpy's method "linear", as torch's own, which refuses more than 2**24 values.
    ordered_N = observed_N.double().sort().values
    place = (1 - rate) * (len(ordered_N) - 1)
    low, share = int(place), place - int(place)
    high = min(low + 1, len(ordered_N) - 1)
    return float((1 - share) * ordered_N[low] + share * ordered_N[high])


def decode(pair: Pair, questions: Questions, threshold: float, rate: float, label: str) -> Result:
    """Decode at a threshold; a nominal rate of 0 or 1 is one model alone, whatever rounding does."""
    if rate >= 1:
        return pair.answer(questions, label, policy="always")
    return pair.answer(questions, label, policy="never" if rate <= 0 else "threshold", threshold=threshold)


def _sweep(
    project: Project, method: Method, seed: int, observed_N: torch.Tensor, folder: Path, trained: Path
) -> list[MeasuredPoint]:
    """The sweep's points, decoding those that are not in the folder yet."""
    settings = project.settings
    file = folder / "points.json"
    points = {p["nominal_rate"]: MeasuredPoint(**p) for p in (read_json(file) if file.exists() else [])}
    missing = [rate for rate in settings.calibrate.rates if rate not in points]
    if missing:
        config = engine_config(settings.engine, project.base_of(method, seed), project.expert_paths, trained / "gate")
        questions = questions_of(project, "validation", settings.calibrate.limit)
        with Pair(config, project.tokenizer) as pair:
            for rate in missing:
                threshold = quantile(observed_N, rate)
                result = decode(pair, questions, threshold, rate, f"calibrate {method}-{seed} at {rate:.0%}")
                points[rate] = MeasuredPoint(
                    nominal_rate=rate,
                    # As ``choose`` has it: above all probabilities, below all of them.
                    threshold=1.0 if rate <= 0 else -1.0 if rate >= 1 else threshold,
                    score=result.score,
                    deferral_rate=result.deferral_rate,
                    seconds=result.seconds,
                    tokens_per_second=result.tokens / result.seconds,
                )
                write_json(file, [asdict(point) for point in points.values()])
    return [points[rate] for rate in settings.calibrate.rates]


def _choose(
    points: list[MeasuredPoint], observed_N: torch.Tensor, target_rate: float | None
) -> tuple[float, MeasuredPoint]:
    """The threshold, and the measured point nearest to it."""
    threshold = choose(points, observed_N) if target_rate is None else interpolate(points, target_rate)
    return threshold, min(points, key=lambda point: abs(point.threshold - threshold))


def interpolate(points: list[MeasuredPoint], target_rate: float) -> float:
    """The threshold in [0, 1] whose measured rate is ``target_rate``, linear between measured points."""
    ordered = sorted(points, key=lambda point: point.deferral_rate)
    below = [point for point in ordered if point.deferral_rate <= target_rate]
    above = [point for point in ordered if point.deferral_rate >= target_rate]
    if not below or not above:
        nearest = (below or above)[-1 if below else 0]
        return min(1.0, max(0.0, nearest.threshold))
    low, high = below[-1], above[0]
    bounds = [min(1.0, max(0.0, point.threshold)) for point in (low, high)]
    span = high.deferral_rate - low.deferral_rate
    share = 0.0 if span == 0 else (target_rate - low.deferral_rate) / span
    return bounds[0] + share * (bounds[1] - bounds[0])

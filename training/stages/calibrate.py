"""Calibrate: decode the validation questions at a sweep of thresholds, on the serving engine, and choose one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from engine.gate import GateArtifact
from training import graph
from training.answers import AnswerCache
from training.files import write_json
from training.gate_only import Gate
from training.graph import GATED
from training.plots import plot_scores
from training.project import Project
from training.serving import Questions, questions_of
from training.settings import Method
from training.stages.score import score_base
from training.thresholds import Point, choose, quantile, reach, refine


@dataclass(frozen=True)
class MeasuredPoint(Point):
    """A point with its cost on the engine: ``seconds`` for all questions together."""

    seconds: float
    tokens_per_second: float


def run(project: Project) -> None:
    """Calibrate the gate of every run that has one."""
    for method, seed in graph.runs(project.settings):
        if method in GATED:
            graph.need_run(project, method, seed)
            calibrate_run(project, method, seed)


def calibrate_run(project: Project, method: Method, seed: int) -> GateArtifact:
    """The calibrated gate of a run."""
    settings, gate = project.settings, project.run(method, seed) / "gate"
    base = project.base_of(method, seed)
    stage = graph.calibration(project, method, seed).claim()
    folder = stage.path
    artifact = GateArtifact.load(gate)
    hidden_ND = score_base(project, "validation", base).hidden_ND
    assert hidden_ND is not None
    observed_N = Gate(artifact.theta, artifact.bias).deferral(hidden_ND)
    target = settings.calibrate.target_rate
    with AnswerCache(project, folder / "answers", f"calibrate {method}-{seed}", base.path, gate) as cache:
        decoder = _Decoder(cache, questions_of(project, "validation", settings.calibrate.limit), observed_N)
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


class _Decoder:
    """Measures thresholds by the answers to the validation questions."""

    def __init__(self, cache: AnswerCache, questions: Questions, observed_N: torch.Tensor) -> None:
        self._cache = cache
        self._questions = questions
        self._observed_N = observed_N

    def at_rate(self, rate: float) -> MeasuredPoint:
        """The point of a nominal rate."""
        return self._measured(quantile(self._observed_N, rate), rate)

    def at_threshold(self, threshold: float) -> MeasuredPoint:
        """The point of a threshold."""
        return self._measured(threshold, float((self._observed_N > threshold).double().mean()))

    def _measured(self, threshold: float, rate: float) -> MeasuredPoint:
        result = self._cache.at_threshold(f"threshold {threshold:.4f}", self._questions, threshold)
        return MeasuredPoint(
            nominal_rate=rate,
            threshold=threshold,
            score=result.score,
            deferral_rate=result.deferral_rate,
            seconds=result.seconds,
            tokens_per_second=result.tokens / result.seconds,
        )

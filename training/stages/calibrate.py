"""Calibrate: decode the validation questions at a sweep of thresholds, on the serving engine, and choose one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.gate import GateArtifact
from training import graph
from training.answers import AnswerCache
from training.files import write_json
from training.gate_only import Gate
from training.graph import GATED
from training.plots import plot_reliability, plot_scores
from training.project import Project
from training.reliability import calibration_error, reliability
from training.serving import Questions, questions_of
from training.settings import Method
from training.stages.score import score_split
from training.thresholds import LOG_ODDS, Point, choose, ends, probability, quantile, reach, refine, remarks
from training.tracking import tracked

_MISSED = 0.05
"""A measured rate that is further from the wished one is worth a warning."""


@dataclass(frozen=True)
class MeasuredPoint(Point):
    """A point with its cost on the engine: ``seconds`` for all questions together. Thresholds are log-odds.

    Attributes:
        expert_seconds_per_token: the answers' part of the experts' steps, per token of theirs, whoever wrote it; None
            where that was not measured.
    """

    seconds: float
    tokens_per_second: float
    expert_seconds_per_token: float | None

    def to_json(self) -> dict[str, float]:
        """As it stands in files: the threshold as a probability, 1 for the base alone and -1 for the experts alone."""
        cost = self.expert_seconds_per_token
        return ({} if cost is None else {"expert_seconds_per_token": cost}) | {
            "nominal_rate": self.nominal_rate,
            "threshold": probability(self.threshold),
            "score": self.score,
            "deferral_rate": self.deferral_rate,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def run(project: Project) -> None:
    """Calibrate the gate of every run that has one."""
    for method, seed in graph.runs(project.settings):
        if method in GATED:
            graph.need_run(project, method, seed)
            calibrate_run(project, method, seed)


def calibrate_run(project: Project, method: Method, seed: int) -> GateArtifact:
    """The calibrated gate of a run."""
    settings, gate = project.settings, graph.trained_gate(project, method, seed)
    base = project.base_of(method, seed)
    stage = graph.calibration(project, method, seed).claim()
    folder = stage.path
    artifact = GateArtifact.load(gate)
    function = Gate.of(artifact)
    scores = score_split(project, "validation", base)
    observed_N = function.log_odds_of(scores.base)
    believed = reliability(torch.sigmoid(observed_N), scores.weak_labels() > 0)
    calibrate = settings.calibrate
    with AnswerCache(project, folder / "answers", f"calibrate {method}-{seed}", base.path, gate) as cache:
        decoder = Decoder(cache, questions_of(project, "validation", calibrate.limit), observed_N)
        swept = points = [decoder.at_rate(rate) for rate in calibrate.rates]
        # For the curve alone, not to choose from: beyond these a gate says nothing that could be interpolated with.
        outermost = [decoder.at_threshold(threshold) for threshold in ends(observed_N, LOG_ODDS)]
        warnings: list[str] = []
        if calibrate.target_rate is not None:
            chosen = reach([*points, *outermost], calibrate.target_rate, decoder.at_threshold, LOG_ODDS)
            if abs(chosen.deferral_rate - calibrate.target_rate) > _MISSED:
                warnings.append(
                    f"calibrate.target_rate {calibrate.target_rate} is missed: the nearest rate that a threshold gave "
                    f"is {chosen.deferral_rate:.2f}"
                )
        elif any(point.score > 0 for point in points):
            points = refine(points, calibrate.refine, decoder.at_rate)
            chosen = choose(points, observed_N, decoder.at_threshold, noise=calibrate.noise, bounds=LOG_ODDS)
        else:
            chosen = decoder.at_threshold(0.0)
            warnings.append(
                "no answer is right at any threshold, so that scores choose none: it stays at 0.5; set "
                "calibrate.target_rate, or compare the answers in this folder with the gold completions"
            )
    threshold = min(1.0, max(0.0, probability(chosen.threshold)))
    points = by_falling_threshold([*outermost, *points, chosen])
    warnings = [*remarks(swept, points), *warnings]
    curve = [point.to_json() for point in points]
    calibrated = replace(artifact, default_threshold=threshold, calibration=curve, reliability=believed)
    calibrated.save(folder / "gate")
    write_json(
        folder / "curve.json",
        {"threshold": threshold, "target_rate": calibrate.target_rate, "points": curve, "warnings": warnings}
        | {"reliability": believed, "calibration_error": calibration_error(believed)},
    )
    plot_reliability(folder / "reliability.png", believed)
    plot_scores(
        folder / "curve.png",
        {f"{method}, validation": [(point.deferral_rate, point.score) for point in points]},
        {f"threshold {threshold:.4g}": (chosen.deferral_rate, chosen.score)},
    )
    with tracked(settings, f"calibrate/{method}-{seed}") as log:
        for number, point in enumerate(points):
            log(number, {name: getattr(point, name) for name in ("score", "deferral_rate", "tokens_per_second")})
    stage.finish(threshold=threshold, score=chosen.score, deferral_rate=chosen.deferral_rate)
    for warning in warnings:
        print(f"warning: {folder}: {warning}")
    print(f"{folder}: threshold {threshold:.6g}: score {chosen.score:.3f} at a rate of {chosen.deferral_rate:.3f}")
    return calibrated


def by_falling_threshold(points: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """The curve of these points: each threshold once."""
    return sorted({point.threshold: point for point in points}.values(), key=lambda point: -point.threshold)


class Decoder:
    """Measures thresholds by the answers to the validation questions.

    Args:
        times: how often each is decoded. The answers are the same; the least that experts took counts, since what else
            the machine does only adds to it.
    """

    def __init__(self, cache: AnswerCache, questions: Questions, observed_N: torch.Tensor, times: int = 1) -> None:
        self._cache = cache
        self._times = times
        self._questions = questions
        self._observed_N = observed_N

    def at_rate(self, rate: float) -> MeasuredPoint:
        """The point of a nominal rate."""
        return self._measured(quantile(self._observed_N, rate, LOG_ODDS), rate)

    def at_threshold(self, threshold: float) -> MeasuredPoint:
        """The point of a threshold."""
        return self._measured(threshold, float((self._observed_N > threshold).double().mean()))

    def _measured(self, threshold: float, rate: float) -> MeasuredPoint:
        asked = probability(threshold)
        labels = [f"threshold {asked:.6g}", *(f"threshold {asked:.6g}, again {n}" for n in range(1, self._times))]
        results = [self._cache.at_threshold(label, self._questions, asked) for label in labels]
        result = min(results, key=lambda each: (each.expert_seconds, each.seconds))
        # Answers of before costs were measured have none.
        measured = result.expert_seconds > 0 or (result.lane_seconds > 0 and result.expert_tokens == 0)
        return MeasuredPoint(
            nominal_rate=rate,
            threshold=threshold,
            score=result.score,
            deferral_rate=result.deferral_rate,
            right=tuple(answer.exact for answer in result.answers),
            seconds=result.seconds,
            tokens_per_second=result.tokens / result.seconds,
            expert_seconds_per_token=result.expert_seconds / result.tokens if measured else None,
        )

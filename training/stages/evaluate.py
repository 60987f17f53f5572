"""Evaluate: every way of answering the test questions, on the serving engine, in one table and one plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.gate import GateArtifact
from engine.hindsight import NEVER
from engine.regret import RegretArtifact
from training import graph, report
from training.answers import AnswerCache
from training.auroc import auroc
from training.data import Example
from training.gate_only import Gate
from training.graph import GATED
from training.project import Project
from training.report import (
    BASE,
    CALIBRATED_CONFIDENCE,
    COLLM,
    CONFIDENCE,
    FINETUNED,
    ORACLE,
    RANDOM,
    UNTRAINED_CONFIDENCE,
    WEAK,
    Row,
    Rows,
    alone,
)
from training.scoring import PairScores
from training.serving import Questions, Result, asked_numbers, by_task, questions_of
from training.settings import Method
from training.stages.score import score_split
from training.strategies import sampled_row, strategy_rows
from training.thresholds import LOG_ODDS, Point, probability, quantile, reach, within_noise

_CONFIDENCE_POINTS = 11
"""Thresholds of which the best for confidence deferral is chosen: as many as the gate's sweep has by default."""


def run(project: Project) -> None:
    """Fill the table and draw the plot; what was decoded before is read, not decoded again."""
    for method, seed in graph.runs(project.settings):
        graph.need_run(project, method, seed)
        if method in GATED:
            graph.calibration(project, method, seed).need("calibrate")
        if method == "collm" and project.settings.regret.ahead:
            graph.regret(project, seed).need("regret")
    stage = graph.evaluation(project).claim()
    evaluation = _Evaluation(project, stage.path)
    for method, seed in graph.runs(project.settings):
        evaluation.of_run(method, seed)
    evaluation.of_members()
    report.write(stage.path, evaluation.rows, evaluation.curves, project.settings.expert_names)
    stage.finish(rows=list(evaluation.rows))


class _Evaluation:
    """The rows and curves so far. An engine starts only for answers that are not in the folder yet."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project = project
        self.folder = folder
        self.questions = questions_of(project, "test", project.settings.evaluate.limit)
        self.numbers = asked_numbers(project, "test", project.settings.evaluate.limit)
        self.validation = questions_of(project, "validation", project.settings.calibrate.limit)
        self.rows: Rows = {}
        self.curves: dict[str, list[tuple[float, float]]] = {}

    def of_run(self, method: Method, seed: int) -> None:
        """The rows of one trained run, and for the first seed its curves."""
        project, name = self.project, f"{method}-{seed}"
        base = project.base_of(method, seed)
        if method == "finetuned":
            with self._cache(name, base.path, None, experts=False) as cache:
                self._add(FINETUNED, seed, cache.answers("member", self.questions, member=0))
            return
        gate = graph.calibration(project, method, seed).path / "gate"
        artifact = GateArtifact.load(gate)
        scores = score_split(project, "test", base).of_examples(self.numbers)
        function = Gate.of(artifact)
        log_odds_N = function.log_odds_of(scores.base)
        first = seed == project.settings.seeds[0]
        with self._cache(name, base.path, gate) as cache:
            result = cache.answers(
                "threshold", self.questions, policy="threshold", threshold=artifact.default_threshold
            )
            if first:
                self._curve(cache, method, result, log_odds_N)
            if method == "collm":
                threshold = artifact.default_threshold
                for row, found, chosen in strategy_rows(project, cache, self.questions, self.validation, threshold):
                    self._add(row, seed, found, **chosen)
        self._add(COLLM if method == "collm" else WEAK, seed, result, **_tokens(scores, log_odds_N))
        if method == "collm":
            self._regret(seed, base.path, artifact.default_threshold, result)
            # What no gate decides is answered once for all runs that serve the user's base. Which of several experts
            # writes is the gate's choice, in all rows.
            alone = base.run is None and len(project.expert_paths) == 1
            chooses = gate if len(project.expert_paths) > 1 else None
            with self._cache("members" if alone else name, base.path, chooses) as cache:
                self._baselines(cache, seed, result.deferral_rate)
                if first:
                    self._baseline_curves(cache)
            self.rows.setdefault(ORACLE, {})[seed] = _oracle(scores, self.questions.examples)

    def _baselines(self, cache: AnswerCache, seed: int, rate: float) -> None:
        """Rows of Co-LLM's models without its gate's decisions."""
        questions, confidence = self.questions, self._confidence(cache)
        same_rate = confidence.threshold_of_rate(_validation_rate(self.project, seed))
        self._add(RANDOM, seed, cache.answers("random", questions, policy="random", rate=rate, seed=seed))
        self._add(CONFIDENCE, seed, confidence.answers(questions, same_rate))
        self._add(CALIBRATED_CONFIDENCE, seed, confidence.answers(questions, confidence.best_threshold()))

    def _regret(self, seed: int, base: Path, threshold: float, plain: Result) -> None:
        """The row of answers with tokens taken back, where that was learned."""
        gate = graph.exported_gate(self.project, seed)
        regret = RegretArtifact.beside(gate)
        if regret is None:
            return
        found, chosen = plain, regret.default_threshold
        if chosen < NEVER:
            with self._cache(f"collm-{seed}", base, gate) as cache:
                found = cache.answers("regret", self.questions, policy="threshold", threshold=threshold, regret=chosen)
        self._add(f"{COLLM}, regret", seed, found, regret=chosen, **{report.TAKEN_BACK: found.taken_back})

    def _curve(self, cache: AnswerCache, method: Method, result: Result, log_odds_N: torch.Tensor) -> None:
        rates = self.project.settings.evaluate.rates
        thresholds = [probability(quantile(log_odds_N, rate, LOG_ODDS)) for rate in rates]
        swept = [_point(cache.at_threshold("curve", self.questions, threshold)) for threshold in thresholds]
        self.curves[COLLM if method == "collm" else WEAK] = sorted([*swept, _point(result)])

    def _baseline_curves(self, cache: AnswerCache) -> None:
        questions, rates = self.questions, self.project.settings.evaluate.rates
        self.curves["random"] = [
            _point(cache.answers(f"random {rate}", questions, policy="random", rate=rate)) for rate in rates
        ]
        confidence = self._confidence(cache)
        self.curves["confidence"] = sorted(
            _point(confidence.answers(questions, threshold)) for threshold in _confidence_thresholds(len(rates))
        )

    def of_members(self) -> None:
        """The models as they came: each alone, and deferral by the untrained base's confidence."""
        project, seed, questions = self.project, self.project.settings.seeds[0], self.questions
        with self._cache("members", project.base, None) as cache:
            self._add(BASE, seed, cache.answers("base", questions, member=0))
            for number, name in enumerate(project.settings.expert_names, start=1):
                self._add(alone(name), seed, cache.answers(f"expert {name}", questions, member=number))
            samples = project.settings.evaluate.samples
            if samples:
                best, found = sampled_row(cache, questions, self.validation, samples)
                member = ["base", *project.settings.expert_names][best]
                self._add(report.sampled(member, samples), seed, found)
            trained = project.settings.train.mode == "joint" and COLLM in self.rows and len(project.expert_paths) == 1
            if trained:
                rate = statistics.mean(_validation_rate(project, seed) for seed in self.rows[COLLM])
                confidence = self._confidence(cache)
                self._add(UNTRAINED_CONFIDENCE, seed, confidence.answers(questions, confidence.threshold_of_rate(rate)))

    def _cache(self, name: str, base: Path, gate: Path | None, *, experts: bool = True) -> AnswerCache:
        return AnswerCache(self.project, self.folder / "answers" / name, name, base, gate, experts=experts)

    def _confidence(self, cache: AnswerCache) -> _Confidence:
        return _Confidence(cache, self.validation, self.project.settings.calibrate.noise)

    def _add(self, name: str, seed: int, result: Result, **more: float | None) -> None:
        self.rows.setdefault(name, {})[seed] = result.summary() | {"right": [a.exact for a in result.answers]} | more


class _Confidence:
    """Deferral where the base is unsure; its thresholds are chosen on the validation questions."""

    def __init__(self, cache: AnswerCache, validation: Questions, noise: float) -> None:
        self._cache = cache
        self._validation = validation
        self._noise = noise

    def answers(self, questions: Questions, threshold: float, what: str = "confidence") -> Result:
        """Answers at a threshold for 1 - (top probability)."""
        return self._cache.answers(what, questions, policy="confidence", threshold=threshold)

    def threshold_of_rate(self, rate: float) -> float:
        """The threshold whose rate on the validation questions is nearest to this."""
        return reach(self._sweep(), rate, self._validated).threshold

    def best_threshold(self) -> float:
        """The threshold that is chosen by the scores on the validation questions, by the rule that the gate's is."""
        points = self._sweep()
        best = max(points, key=lambda point: point.score)
        good = [point for point in points if within_noise(point, best, self._noise)]
        return min(good, key=lambda point: (point.deferral_rate, -point.score)).threshold

    def _sweep(self) -> list[Point]:
        return [self._validated(threshold) for threshold in _confidence_thresholds(_CONFIDENCE_POINTS)]

    def _validated(self, threshold: float) -> Point:
        found = self.answers(self._validation, threshold, "confidence, validation")
        right = tuple(answer.exact for answer in found.answers)
        return Point(found.deferral_rate, threshold, found.score, found.deferral_rate, right=right)


def _validation_rate(project: Project, seed: int) -> float:
    """The rate that the calibrated gate measured on the validation questions."""
    rate: float = graph.calibration(project, "collm", seed).results["deferral_rate"]
    return rate


def _confidence_thresholds(count: int) -> list[float]:
    """Thresholds for 1 - (top probability): never, always, and between them closer together near 0."""
    inner = [(number / (count - 1)) ** 2 for number in range(1, count - 1)] if count > 2 else []
    return [0.0, *inner, 1.0]


def _point(result: Result) -> tuple[float, float]:
    return result.deferral_rate, result.score


def _tokens(scores: PairScores, log_odds_N: torch.Tensor) -> dict[str, float | None]:
    """What the gate says of gold tokens at which any expert may be asked, teacher-forced: see ``auroc``."""
    aligned_NK = scores.aligned_NK
    asked_N = torch.ones_like(log_odds_N, dtype=torch.bool) if aligned_NK is None else aligned_NK.any(dim=1)
    wrong_N = scores.base.top_N != scores.gold_N
    return {
        "auroc_base_wrong": auroc(log_odds_N[asked_N], wrong_N[asked_N]),
        "auroc_expert_needed": auroc(log_odds_N[asked_N], (scores.weak_labels() > 0)[asked_N]),
    }


def _oracle(scores: PairScores, examples: Sequence[Example]) -> Row:
    """Greedy decoding that defers where only an expert has the gold token.

    Its text is the gold text up to its first token that no model has, so the cached scores tell exactly how many
    answers it gets right. The rate is over all gold tokens.
    """
    right_N = scores.base.top_N == scores.gold_N
    for expert in scores.experts:
        right_N = right_N | (expert.top_N == scores.gold_N)
    exact = [bool(right_N[a:b].all()) for a, b in zip(scores.starts, scores.starts[1:], strict=False)]
    needed = int((scores.weak_labels() > 0).sum())
    return {
        "questions": len(exact),
        "exact_match": sum(exact) / len(exact),
        "right": exact,
        "by_task": by_task([(example.task, right) for example, right in zip(examples, exact, strict=True)]),
        "deferral_rate": needed / len(right_N),
        "expert_tokens": needed,
        "tokens": len(right_N),
    }

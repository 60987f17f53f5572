"""Evaluate: every way of answering the test questions, on the serving engine, in one table and one plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.gate import GateArtifact
from training import report
from training.auroc import auroc
from training.data import Example
from training.files import StageFolder, hash_of, read_json, write_json
from training.gate_only import Gate
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
from training.serving import Pair, Result, by_task, engine_config
from training.settings import Method
from training.stages import calibrate
from training.stages.score import score_split
from training.stages.train import need_run
from training.thresholds import Point, quantile, reach

_CONFIDENCE_POINTS = 11
"""Thresholds of which the best for confidence deferral is chosen: as many as the gate's sweep has by default."""


def run(project: Project) -> None:
    """Fill the table and draw the plot; what was decoded before is read, not decoded again."""
    settings = project.settings
    resolved = {
        "evaluate": settings.evaluate.model_dump(exclude={"rates"}),
        # The thresholds of confidence deferral are chosen on the questions that the gate's were.
        "validation": {"limit": settings.calibrate.limit},
        "engine": settings.engine.model_dump(),
    }
    # Answers are kept by the models and the gate that gave them: more seeds or methods only add to them.
    inputs = {split: project.data(split).fingerprint for split in ("validation", "test")}
    for seed in settings.seeds:
        for method in settings.train.methods:
            need_run(project, method, seed)
            if method != "finetuned":
                calibrate.stage_of(project, method, seed).need("calibrate")
    stage = StageFolder(project.folder("evaluate"), resolved, inputs).open()
    evaluation = _Evaluation(project, stage.path)
    for seed in settings.seeds:
        for method in settings.train.methods:
            evaluation.of_run(method, seed)
    evaluation.of_members()
    report.write(stage.path, evaluation.rows, evaluation.curves, project.settings.expert_names)
    stage.finish(rows=list(evaluation.rows))


class _Evaluation:
    """The rows and curves so far. An engine starts only for answers that are not in the folder yet."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project = project
        self.folder = folder
        self.questions = calibrate.questions_of(project, "test", project.settings.evaluate.limit)
        self.numbers = calibrate.numbers_of(project, "test", project.settings.evaluate.limit)
        self.validation = calibrate.questions_of(project, "validation", project.settings.calibrate.limit)
        self.rows: Rows = {}
        self.curves: dict[str, list[tuple[float, float]]] = {}

    def of_run(self, method: Method, seed: int) -> None:
        """The rows of one trained run, and for the first seed its curves."""
        project = self.project
        base, first = project.base_of(method, seed), seed == project.settings.seeds[0]
        if method == "finetuned":
            with _Lane(self, f"{method}-{seed}", base, None, experts=False) as lane:
                self._add(FINETUNED, seed, lane.answers("member", member=0))
            return
        gate = calibrate.folder_of(project, method, seed) / "gate"
        artifact = GateArtifact.load(gate)
        name = COLLM if method == "collm" else WEAK
        scores = score_split(project, "test", project.run(method, seed)).of_examples(self.numbers)
        deferral_N = Gate(artifact.theta, artifact.bias).deferral(scores.hidden_ND)
        with _Lane(self, f"{method}-{seed}", base, gate, experts=True) as lane:
            result = lane.answers("threshold", policy="threshold", threshold=artifact.default_threshold)
            self._add(name, seed, result, **_tokens(scores, deferral_N))
            if method == "collm":
                rate = result.deferral_rate
                self._add(RANDOM, seed, lane.answers("random", policy="random", rate=rate, seed=seed))
                self._add(CONFIDENCE, seed, lane.confidence(lane.threshold_of_rate(_validation_rate(project, seed))))
                self._add(CALIBRATED_CONFIDENCE, seed, lane.confidence(lane.best_threshold()))
                self.rows.setdefault(ORACLE, {})[seed] = _oracle(scores, self.questions.examples)
            if first:
                rates = project.settings.evaluate.rates
                swept = [_point(lane.decoded(quantile(deferral_N, rate))) for rate in rates]
                self.curves[name] = sorted([*swept, _point(result)])
                if method == "collm":
                    self.curves["random"] = [
                        _point(lane.answers(f"random {rate}", policy="random", rate=rate)) for rate in rates
                    ]
                    self.curves["confidence"] = sorted(
                        _point(lane.confidence(threshold)) for threshold in _confidence_thresholds(len(rates))
                    )

    def of_members(self) -> None:
        """The models as they came: each alone, and deferral by the untrained base's confidence."""
        project, seed = self.project, self.project.settings.seeds[0]
        with _Lane(self, "members", project.base, None, experts=True) as lane:
            self._add(BASE, seed, lane.answers("base", member=0))
            for number, name in enumerate(project.settings.expert_names, start=1):
                self._add(alone(name), seed, lane.answers(f"expert {name}", member=number))
            trained = project.settings.train.mode == "joint" and COLLM in self.rows and len(project.expert_paths) == 1
            if trained:
                rate = statistics.mean(_validation_rate(project, seed) for seed in self.rows[COLLM])
                self._add(UNTRAINED_CONFIDENCE, seed, lane.confidence(lane.threshold_of_rate(rate)))

    def _add(self, name: str, seed: int, result: Result, **more: float | None) -> None:
        self.rows.setdefault(name, {})[seed] = result.summary() | more


class _Lane:
    """Answers by one set of models: from the folder, or from an engine that starts when it is first needed."""

    def __init__(self, evaluation: _Evaluation, name: str, base: Path, gate: Path | None, *, experts: bool) -> None:
        project = evaluation.project
        self._evaluation = evaluation
        self._name = name
        paths = project.expert_paths if experts else {}
        self._config = engine_config(project.settings.engine, base, paths, gate)
        self._models = [project.hash_of(path) for path in (base, *paths.values(), *([gate] if gate else []))]
        self._pair: Pair | None = None

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pair is not None:
            self._pair.__exit__(None, None, None)

    def answers(self, what: str, **how: Any) -> Result:
        """Answers to all test questions; ``how`` as in ``Pair.answer``."""
        questions = self._evaluation.questions
        return self._kept(what, how, lambda pair, label: pair.answer(questions, label, **how))

    def decoded(self, threshold: float) -> Result:
        """A point of the threshold's curve."""
        questions = self._evaluation.questions
        how = {"threshold": threshold}
        return self._kept("curve", how, lambda pair, label: calibrate.decode(pair, questions, threshold, label))

    def confidence(self, threshold: float) -> Result:
        """Answers to all test questions, deferring where the base is unsure."""
        return self.answers("confidence", policy="confidence", threshold=threshold)

    def threshold_of_rate(self, rate: float) -> float:
        """The threshold of confidence deferral whose rate on the validation questions is nearest to this."""
        return reach(self._confidence_sweep(), rate, self._validated).threshold

    def best_threshold(self) -> float:
        """The threshold of confidence deferral with the best score on the validation questions."""
        return max(self._confidence_sweep(), key=lambda point: (point.score, -point.deferral_rate)).threshold

    def _confidence_sweep(self) -> list[Point]:
        return [self._validated(threshold) for threshold in _confidence_thresholds(_CONFIDENCE_POINTS)]

    def _validated(self, threshold: float) -> Point:
        how: dict[str, Any] = {"policy": "confidence", "threshold": threshold}
        questions = self._evaluation.validation
        found = self._kept("confidence, validation", how, lambda pair, label: pair.answer(questions, label, **how))
        return Point(found.deferral_rate, threshold, found.score, found.deferral_rate)

    def _kept(self, what: str, how: Mapping[str, Any], ask: Callable[[Pair, str], Result]) -> Result:
        file = self._evaluation.folder / "answers" / self._name / f"{hash_of([what, how, self._models])}.json"
        if file.exists():
            return Result.from_json(read_json(file))
        if self._pair is None:
            self._pair = Pair(self._config, self._evaluation.project.tokenizer)
        result = ask(self._pair, f"{self._name}: {what}")
        write_json(file, {"what": what, "how": dict(how)} | result.to_json())
        return result


def _validation_rate(project: Project, seed: int) -> float:
    """The rate that the calibrated gate measured on the validation questions."""
    rate: float = calibrate.stage_of(project, "collm", seed).results["deferral_rate"]
    return rate


def _confidence_thresholds(count: int) -> list[float]:
    """Thresholds for 1 - (top probability): never, always, and between them closer together near 0."""
    inner = [(number / (count - 1)) ** 2 for number in range(1, count - 1)] if count > 2 else []
    return [0.0, *inner, 1.0]


def _point(result: Result) -> tuple[float, float]:
    return result.deferral_rate, result.score


def _tokens(scores: PairScores, deferral_N: torch.Tensor) -> dict[str, float | None]:
    """What the gate says of gold tokens, teacher-forced: see ``auroc``."""
    wrong_N = scores.base.top_N != scores.gold_N
    return {
        "auroc_base_wrong": auroc(deferral_N, wrong_N),
        "auroc_expert_needed": auroc(deferral_N, scores.weak_labels() > 0),
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
        "by_task": by_task([(example.task, right) for example, right in zip(examples, exact, strict=True)]),
        "deferral_rate": needed / len(right_N),
        "expert_tokens": needed,
        "tokens": len(right_N),
    }

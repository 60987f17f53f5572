"""Evaluate: every way of answering the test questions, on the serving engine, in one table and one plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.gate import GateArtifact
from training.auroc import auroc
from training.files import StageFolder, hash_of, hash_of_path, read_json, write_json, write_text
from training.gate_only import Gate
from training.plots import plot_scores
from training.project import Project
from training.scoring import PairScores
from training.serving import Pair, Result, engine_config
from training.settings import Method
from training.stages.calibrate import decode, folder_of, quantile, questions_of
from training.stages.score import score_split

BASE, COLLM, WEAK, FINETUNED = "base alone", "Co-LLM", "weakly supervised", "fine-tuned base"
RANDOM, CONFIDENCE = "random, same rate", "confidence, same rate"
UNTRAINED_CONFIDENCE, ORACLE = "confidence, untrained base, same rate", "oracle (teacher-forced)"

_RATE_TOLERANCE = 0.005
_BISECTIONS = 8

Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]


def run(project: Project) -> None:
    """Fill the table and draw the plot; what was decoded before is read, not decoded again."""
    settings = project.settings
    resolved = {
        "evaluate": settings.evaluate.model_dump(exclude={"rates"}),
        "engine": settings.engine.model_dump(),
    }
    # Answers are kept by the models and the gate that gave them: more seeds or methods only add to them.
    inputs = {"test": project.data("test").fingerprint}
    for seed in settings.seeds:
        for method in settings.train.methods:
            project.need(project.run(method, seed), "train")
            if method != "finetuned":
                project.need(folder_of(project, method, seed), "calibrate")
    stage = StageFolder.open(project.folder("evaluate"), resolved, inputs)
    evaluation = _Evaluation(project, stage.path)
    for seed in settings.seeds:
        for method in settings.train.methods:
            evaluation.of_run(method, seed)
    evaluation.of_members()
    _report(project, stage.path, evaluation)
    stage.finish(rows=list(evaluation.rows))


class _Evaluation:
    """The rows and curves so far. An engine starts only for answers that are not in the folder yet."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project = project
        self.folder = folder
        self.questions = questions_of(project, "test", project.settings.evaluate.limit)
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
        gate = folder_of(project, method, seed) / "gate"
        artifact = GateArtifact.load(gate)
        name = COLLM if method == "collm" else WEAK
        scores = score_split(project, "test", project.run(method, seed))
        deferral_N = Gate(artifact.theta, artifact.bias).deferral(scores.hidden_ND)
        with _Lane(self, f"{method}-{seed}", base, gate, experts=True) as lane:
            result = lane.answers("threshold", policy="threshold", threshold=artifact.default_threshold)
            self._add(name, seed, result, **_tokens(scores, deferral_N))
            if method == "collm":
                rate = result.deferral_rate
                self._add(RANDOM, seed, lane.answers("random", policy="random", rate=rate, seed=seed))
                self._add(CONFIDENCE, seed, lane.at_rate(rate))
                self.rows.setdefault(ORACLE, {})[seed] = _oracle(scores)
            if first:
                rates = project.settings.evaluate.rates
                self.curves[name] = [_point(lane.decoded(quantile(deferral_N, rate), rate)) for rate in rates]
                if method == "collm":
                    self.curves["random"] = [
                        _point(lane.answers(f"random {rate}", policy="random", rate=rate)) for rate in rates
                    ]
                    self.curves["confidence"] = sorted(
                        _point(lane.answers(f"confidence {t}", policy="confidence", threshold=t))
                        for t in _confidence_thresholds(len(rates))
                    )

    def of_members(self) -> None:
        """The models as they came: each alone, and deferral by the untrained base's confidence."""
        project, seed = self.project, self.project.settings.seeds[0]
        with _Lane(self, "members", project.base, None, experts=True) as lane:
            self._add(BASE, seed, lane.answers("base", member=0))
            for number, name in enumerate(project.settings.expert_names, start=1):
                self._add(f"{name} alone", seed, lane.answers(f"expert {name}", member=number))
            trained = project.settings.train.mode == "joint" and COLLM in self.rows and len(project.expert_paths) == 1
            if trained:
                rate = statistics.mean(row["deferral_rate"] for row in self.rows[COLLM].values())
                self._add(UNTRAINED_CONFIDENCE, seed, lane.at_rate(rate))

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
        self._models = [hash_of_path(path) for path in (base, *paths.values(), *([gate] if gate else []))]
        self._pair: Pair | None = None

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pair is not None:
            self._pair.__exit__(None, None, None)

    def answers(self, what: str, **how: Any) -> Result:
        """Answers to all questions; ``how`` as in ``Pair.answer``."""
        return self._kept(what, how, lambda pair, label: pair.answer(self._evaluation.questions, label, **how))

    def decoded(self, threshold: float, rate: float) -> Result:
        """A point of the threshold's curve."""
        how = {"threshold": threshold, "rate": rate}
        questions = self._evaluation.questions
        return self._kept(f"curve {rate}", how, lambda pair, label: decode(pair, questions, threshold, rate, label))

    def at_rate(self, rate: float) -> Result:
        """Confidence deferral with the threshold that measures this rate most nearly, by bisection."""
        low, high, best = 0.0, 1.0, None
        for step in range(_BISECTIONS):
            middle = (low + high) / 2
            result = self.answers(f"confidence bisection {step}", policy="confidence", threshold=middle)
            if best is None or abs(result.deferral_rate - rate) < abs(best.deferral_rate - rate):
                best = result
            if abs(result.deferral_rate - rate) <= _RATE_TOLERANCE:
                break
            low, high = (middle, high) if result.deferral_rate > rate else (low, middle)
        assert best is not None
        return best

    def _kept(self, what: str, how: Mapping[str, Any], ask: Callable[[Pair, str], Result]) -> Result:
        file = self._evaluation.folder / "answers" / self._name / f"{hash_of([what, how, self._models])}.json"
        if file.exists():
            return Result.from_json(read_json(file))
        if self._pair is None:
            self._pair = Pair(self._config, self._evaluation.project.tokenizer)
        result = ask(self._pair, f"{self._name}: {what}")
        write_json(file, {"what": what, "how": dict(how)} | result.to_json())
        return result


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


def _oracle(scores: PairScores) -> Row:
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
        "by_task": {},
        "deferral_rate": needed / len(right_N),
        "expert_tokens": needed,
        "tokens": len(right_N),
    }


def _report(project: Project, folder: Path, evaluation: _Evaluation) -> None:
    order = [
        BASE,
        *(f"{name} alone" for name in project.settings.expert_names),
        FINETUNED, COLLM, WEAK, RANDOM, CONFIDENCE, UNTRAINED_CONFIDENCE, ORACLE,
    ]  # fmt: skip
    rows = {name: evaluation.rows[name] for name in order if name in evaluation.rows}
    text = table(rows)
    summary = {
        name: {key: _mean_and_spread(by_seed, key) for key in ("exact_match", "deferral_rate")}
        for name, by_seed in rows.items()
    }
    write_json(
        folder / "table.json",
        {
            "rows": rows,
            "mean_and_spread": summary,
            "curves": {name: [list(point) for point in curve] for name, curve in evaluation.curves.items()},
        },
    )
    write_text(folder / "table.md", text)
    points = {name: (found["deferral_rate"][0], found["exact_match"][0]) for name, found in summary.items()}
    plot_scores(folder / "curves.png", evaluation.curves, points)
    print(text)
    print(f"{folder / 'table.md'}, table.json, curves.png")


def _mean_and_spread(by_seed: Mapping[int, Row], key: str) -> tuple[float, float]:
    """Mean over the seeds, and largest less smallest."""
    values = [row[key] for row in by_seed.values()]
    return statistics.mean(values), max(values) - min(values)


def table(rows: Rows) -> str:
    """The Markdown table: "mean ± spread" where there are several seeds, the spread being largest less smallest."""
    tasks = sorted({task for by_seed in rows.values() for row in by_seed.values() for task in row["by_task"]})
    tasks = tasks if len(tasks) > 1 else []
    heads = ["method", "seeds", "exact match", *tasks, "deferral rate", "expert tokens", "tokens/s", "AUROC"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, by_seed in rows.items():
        found = list(by_seed.values())
        cells = [name, str(len(found)), _cell([row["exact_match"] for row in found], 3)]
        cells += [_cell([row["by_task"][task] for row in found if task in row["by_task"]], 3) for task in tasks]
        cells += [
            _cell([row["deferral_rate"] for row in found], 3),
            _cell([row["expert_tokens"] for row in found], 0),
            _cell([row["tokens_per_second"] for row in found if "tokens_per_second" in row], 0),
            _cell([row["auroc_base_wrong"] for row in found if row.get("auroc_base_wrong") is not None], 3),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    legend = (
        "Greedy, on the serving engine. Several seeds: mean ± (largest - smallest). AUROC: of the deferral "
        "probability for gold tokens that the base's argmax misses, teacher-forced. The oracle is computed from "
        "teacher-forced scores, and defers only where an expert's argmax is the gold token and the base's is not."
    )
    return "\n".join(lines) + "\n\n" + legend + "\n"


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {max(values) - min(values):.{digits}f}"

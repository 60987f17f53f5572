"""The graph of stages: what each reads, which settings its output depends on, and where that output is.

    score ──> init ──> train ──> (rollouts) ──> calibrate ──> (regret) ──> export
      └─────────┴────────┴───────────┴──────────────┴────────────┴───────> evaluate

A stage has an output for each split and model (score), each seed (init, rollouts, regret) or each method and seed
(train, calibrate). Without rollouts, which are off by default, calibrate reads what train made; without a regret, which
is off too, what calibrate made is exported.
An output is a ``StageFolder``, whose fingerprint is of its settings and of the fingerprints of what it reads; so what
changes anywhere makes all later outputs stale.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training.files import StageFolder
from training.settings import Method, Settings, Split

if TYPE_CHECKING:
    from training.project import BaseRef, Project

BASE = "base"
GATED: tuple[Method, ...] = ("collm", "weak")
"""Methods that train a gate."""


@dataclass(frozen=True)
class Stage:
    """One kind of output of a project.

    Attributes:
        help: what it does, for people.
        inputs: the stages whose outputs it reads. All read data and models too.
        settings: names of the settings that its output depends on.
    """

    name: str
    help: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]

    def run(self, project: Project) -> None:
        """Make all of the stage's outputs that are not there yet."""
        # Late: what only asks for the list of stages does not wait for torch.
        importlib.import_module(f"training.stages.{self.name}").run(project)

    def resolve(self, settings: Settings) -> dict[str, Any]:
        """The settings that its output depends on, by name."""
        content = settings.model_dump(mode="json")
        return {name: _find(content, name) for name in self.settings}


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "score", "score gold completions with every model (cached)", inputs=(),
            settings=("compute.dtype", "score.shard", "score.hidden", "score.by"),
        ),
        Stage(
            "init", "fit the gate by weak supervision", inputs=("score",),
            settings=("gate", "init", "train.warm_up", "train.bias"),
        ),
        Stage(
            "train", "train the runs that the settings name", inputs=("score", "init"),
            settings=("train.warm_up", "train.bias", "train.weak_positive_weight"),
        ),
        Stage(
            "rollouts", "let the gate learn from answers that it draws (off by default)", inputs=("score", "train"),
            settings=("rollouts", "calibrate.rates", "calibrate.limit", "engine", "evaluate.room"),
        ),
        Stage(
            "calibrate", "decode validation questions at a sweep of thresholds and choose one",
            inputs=("score", "train", "rollouts"),
            settings=("calibrate.rates", "calibrate.refine", "calibrate.limit", "engine", "evaluate.room"),
        ),
        Stage(
            "regret", "learn when an expert's token is to be taken back (off by default)",
            inputs=("score", "train", "calibrate"),
            settings=("regret", "calibrate.limit", "engine", "evaluate.room"),
        ),
        Stage(
            "export", "copy the pair to be served into one folder", inputs=("calibrate", "regret"), settings=("engine",)
        ),
        Stage(
            "evaluate", "answer the test questions in every way: table and plot",
            inputs=("score", "train", "calibrate", "regret"),
            settings=("evaluate.limit", "evaluate.room", "calibrate.limit", "engine"),
        ),
    )
}  # fmt: skip


def _find(content: Any, name: str) -> Any:
    for key in name.split("."):
        content = content[key]
    return content


def runs(settings: Settings) -> Iterator[tuple[Method, int]]:
    """The method and seed of every run that the settings name."""
    for seed in settings.seeds:
        for method in settings.train.methods:
            yield method, seed


def mode_of(settings: Settings, method: Method) -> Literal["gate", "joint"]:
    """What learns. A fine-tuned base always does, whatever train.mode says."""
    return "joint" if method == "finetuned" else settings.train.mode


def scores(project: Project, split: Split, name: str, base: BaseRef | None = None) -> StageFolder:
    """The scores of a split by one model.

    Args:
        name: "base", or an expert's.
        base: which base; None is the user's.
    """
    base = base or project.user_base
    folder = project.folder("score", split, name)
    if name == BASE and base.run is not None:
        folder = project.folder("score", f"{split}-by-trained-base", base.run)
    model = project.hash_of(base.path) if name == BASE else project.hash_of_expert(name)
    inputs = {"model": model, "data": project.data(split).fingerprint}
    resolved = STAGES["score"].resolve(project.settings) | {"columns": "hidden states mapped"}
    if name != BASE:
        resolved |= _templates(project)
    return StageFolder(folder, resolved, inputs)


def _templates(project: Project) -> dict[str, str]:
    """By whose chat template experts read conversations, where that is not what it is mostly."""
    found = project.settings.data.chat_templates
    return {} if found == "base" else {"data.chat_templates": found}


def _all_scores(project: Project, split: Split) -> dict[str, str]:
    """Fingerprints of the scores of a split, by each model's name."""
    return {name: scores(project, split, name).fingerprint for name in (BASE, *project.expert_paths)}


def initial_gate(project: Project, seed: int) -> StageFolder:
    """The initial gate of a seed."""
    resolved = STAGES["init"].resolve(project.settings) | {"seed": seed, "experts": project.settings.expert_names}
    return StageFolder(project.folder("init", f"seed-{seed}"), resolved, _all_scores(project, "train"))


def training_run(project: Project, method: Method, seed: int) -> StageFolder:
    """A run: ``gate/`` and, where the base learns, ``base/``."""
    mode = mode_of(project.settings, method)
    resolved = STAGES["train"].resolve(project.settings) | {
        "method": method,
        "mode": mode,
        "seed": seed,
        "settings": getattr(project.settings.train, mode).model_dump(mode="json"),
        "experts": project.settings.expert_names,
    }
    # Scores are inputs of the initial gate already.
    inputs = {"initial gate": initial_gate(project, seed).fingerprint}
    if mode == "gate":
        # Training is kept only where it betters the initial gate on them.
        inputs |= {f"validation scores of {name}": found for name, found in _all_scores(project, "validation").items()}
    return StageFolder(project.run(method, seed), resolved, inputs)


def rollouts(project: Project, seed: int) -> StageFolder:
    """What the gate of a seed learned from the answers that it drew."""
    resolved = STAGES["rollouts"].resolve(project.settings) | {"seed": seed} | _templates(project)
    inputs = {
        "trained gate": project.hash_of(project.run("collm", seed) / "gate"),
        "training data": project.data("train").fingerprint,
        "validation scores": scores(project, "validation", BASE, project.base_of("collm", seed)).fingerprint,
        **{name: project.hash_of_expert(name) for name in project.expert_paths},
    }
    return StageFolder(project.folder("rollouts", f"collm-{seed}"), resolved, inputs)


def trained_gate(project: Project, method: Method, seed: int) -> Path:
    """Where the gate is that is calibrated."""
    drawn = method == "collm" and project.settings.rollouts.rounds > 0
    return (project.folder("rollouts", f"{method}-{seed}") if drawn else project.run(method, seed)) / "gate"


def calibration(project: Project, method: Method, seed: int) -> StageFolder:
    """The calibration of a run. A wished rate is no part of what it is: the answers are the same for all."""
    base = project.base_of(method, seed)
    inputs = {
        # No expert can have the names with a space.
        "trained gate": project.hash_of(trained_gate(project, method, seed)),
        "validation scores": scores(project, "validation", BASE, base).fingerprint,
        **{name: project.hash_of_expert(name) for name in project.expert_paths},
    }
    folder = project.folder("calibrate", f"{method}-{seed}")
    return StageFolder(folder, STAGES["calibrate"].resolve(project.settings) | _templates(project), inputs)


def regret(project: Project, seed: int) -> StageFolder:
    """The calibrated gate of a seed, and the regret beside it."""
    base = project.base_of("collm", seed)
    inputs = {"calibrated gate": project.hash_of(project.folder("calibrate", f"collm-{seed}") / "gate")}
    splits: tuple[Split, Split] = ("train", "validation")
    for split in splits:
        for name in (BASE, *project.expert_paths):
            inputs[f"{split} scores of {name}"] = scores(project, split, name, base).fingerprint
    resolved = STAGES["regret"].resolve(project.settings) | {"seed": seed} | _templates(project)
    return StageFolder(project.folder("regret", f"collm-{seed}"), resolved, inputs)


def exported_gate(project: Project, seed: int) -> Path:
    """The folder of the gate that is served: where a regret was learned, with it."""
    learned = project.settings.regret.ahead > 0 and regret(project, seed).done
    return project.folder("regret" if learned else "calibrate", f"collm-{seed}") / "gate"


def evaluation(project: Project) -> StageFolder:
    """Table and plot. Answers are kept by models and gate: more seeds or methods only add to them."""
    splits: tuple[Split, Split] = ("validation", "test")
    inputs = {str(split): project.data(split).fingerprint for split in splits}
    return StageFolder(
        project.folder("evaluate"), STAGES["evaluate"].resolve(project.settings) | _templates(project), inputs
    )


def need_run(project: Project, method: Method, seed: int) -> None:
    """Raise unless a run, with these settings, is there, and what it learned from rollouts.

    Raises:
        TrainingError: saying which command has to be run first.
    """
    need_training(project, method, seed)
    if method == "collm" and project.settings.rollouts.rounds:
        rollouts(project, seed).need("rollouts")


def need_training(project: Project, method: Method, seed: int) -> None:
    """Raise unless a run, with these settings, is there.

    Raises:
        TrainingError: saying that ``train`` has to be run first.
    """
    initial_gate(project, seed).need("train")
    training_run(project, method, seed).need("train")

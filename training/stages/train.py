"""Train: one run for each method and seed."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from engine.gate import GateArtifact, ModelIdentity, model_identity
from training.checkpoints import load_causal, save_base
from training.files import StageFolder, hash_of
from training.fit import CHECKPOINT, Plan
from training.gate_only import Gate, GateFit, fit_gate, steps_of
from training.joint import JointFit, fit_joint
from training.losses import Loss, language, marginal, weak, weakly_joint
from training.project import Project
from training.settings import Method
from training.stages import init
from training.stages.score import fingerprints, score_split

LOSSES: dict[tuple[str, Method], Loss] = {
    ("gate", "collm"): marginal,
    ("gate", "weak"): weak,
    ("joint", "collm"): marginal,
    ("joint", "weak"): weakly_joint,
    ("joint", "finetuned"): language,
}
"""By what learns: "gate" is theta alone. A fine-tuned base always learns, whatever train.mode says."""


def run(project: Project) -> None:
    """Train all runs that are not there yet."""
    for seed in project.settings.seeds:
        for method in project.settings.train.methods:
            train_run(project, method, seed)


def train_run(project: Project, method: Method, seed: int) -> Path:
    """One run; its folder, with ``gate/`` (not for a fine-tuned base) and, where the base learned, ``base/``."""
    settings, mode = project.settings, _mode(project, method)
    start = init.initial_gate(project, seed)
    stage = stage_of(project, method, seed, start).open()
    folder = stage.path
    if stage.done:
        return folder
    label = f"train {method}, seed {seed}"
    loss = LOSSES[mode, method]
    scores = score_split(project, "train")
    if mode == "gate":
        gate = _gate_only(project, start, loss, seed, folder, label)
    else:
        base = load_causal(project.base, "float32", project.device)
        tokens = project.data("train").tokens
        joint = settings.train.joint
        fitting = JointFit(
            settings=joint,
            plan=_plan(project, steps_of(len(tokens), joint.batch_size, joint.epochs)),
            positive_weight=settings.train.weak_positive_weight,
            bias=settings.train.bias,
            seed=seed,
            vocabulary=project.vocabulary,
        )
        base, gate = fit_joint(base, tokens, scores, start, loss, fitting, folder, label)
        save_base(base, project.base, folder / "base")
    if method != "finetuned":
        artifact(project, gate, folder, stage.settings).save(folder / "gate")
    (folder / CHECKPOINT).unlink(missing_ok=True)
    stage.finish(examples=len(project.data("train").tokens), tokens=len(scores.gold_N))
    return folder


def stage_of(project: Project, method: Method, seed: int, start: Gate) -> StageFolder:
    """A run from an initial gate."""
    settings, mode = project.settings.train, _mode(project, method)
    resolved = {
        "method": method,
        "mode": mode,
        "seed": seed,
        "settings": getattr(settings, mode).model_dump(),
        "warm_up": settings.warm_up,
        "bias": settings.bias,
        "positive_weight": settings.weak_positive_weight,
        "experts": project.settings.expert_names,
    }
    # No expert can have the name of the gate's entry: it has a space.
    inputs = {
        "initial gate": hash_of([start.theta_KD.tolist(), start.bias_K.tolist()]),
        **fingerprints(project, "train"),
    }
    return StageFolder(project.run(method, seed), resolved, inputs)


def need_run(project: Project, method: Method, seed: int) -> None:
    """Raise unless a run, with these settings, is there.

    Raises:
        TrainingError: saying that ``train`` has to be run first.
    """
    initial = init.stage_of(project, seed)
    initial.need("train")
    stage_of(project, method, seed, init.read_gate(initial)).need("train")


def _mode(project: Project, method: Method) -> Literal["gate", "joint"]:
    return "joint" if method == "finetuned" else project.settings.train.mode


def _gate_only(project: Project, start: Gate, loss: Loss, seed: int, folder: Path, label: str) -> Gate:
    settings, scores = project.settings.train, score_split(project, "train")
    steps = steps_of(len(scores.gold_N), settings.gate.batch_tokens, settings.gate.epochs)
    fitting = GateFit(
        learning_rate=settings.gate.learning_rate,
        weight_decay=settings.gate.weight_decay,
        batch_tokens=settings.gate.batch_tokens,
        plan=_plan(project, steps),
        positive_weight=settings.weak_positive_weight,
        bias=settings.bias,
        seed=seed,
    )
    return fit_gate(scores, start, loss, fitting, folder, label, project.device)


def _plan(project: Project, steps: int) -> Plan:
    return Plan(steps, project.settings.train.warm_up, project.settings.train.checkpoint_every)


def artifact(project: Project, gate: Gate, folder: Path, resolved: Mapping[str, Any]) -> GateArtifact:
    """The run's gate as the server loads it, not calibrated yet."""
    base = folder / "base"
    experts: list[ModelIdentity | None] = [model_identity(path) for path in project.expert_paths.values()]
    return GateArtifact(
        theta=gate.theta_KD.to(torch.float32),
        bias=gate.bias_K.to(torch.float32),
        experts=project.settings.expert_names,
        base=model_identity(base if base.is_dir() else project.base),
        expert_identities=tuple(experts),
        training={**resolved, "init": project.settings.init.model_dump()},
        data=f"{len(project.data('train').examples)} examples of {Path(project.settings.data.train).name}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )

"""Train: one run for each method and seed."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints import ModelIdentity, model_identity
from engine.gate import GateArtifact
from training import graph
from training.checkpoints import load_causal, save_base
from training.fit import CHECKPOINT, Plan
from training.gate_only import Gate, GateFit, fit_gate, steps_of
from training.joint import JointFit, fit_joint
from training.losses import Loss, language, marginal, weak, weakly_joint
from training.project import Project
from training.scoring import PairScores
from training.settings import Method
from training.stages import init
from training.stages.score import TrainingScores

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
    scores = TrainingScores(project)
    for method, seed in graph.runs(project.settings):
        train_run(project, method, seed, scores)


def train_run(project: Project, method: Method, seed: int, scores: TrainingScores | None = None) -> Path:
    """One run; its folder, with ``gate/`` (not for a fine-tuned base) and, where the base learned, ``base/``."""
    settings, mode = project.settings, graph.mode_of(project.settings, method)
    scores = scores or TrainingScores(project)
    start = init.initial_gate(project, seed, scores)
    stage = graph.training_run(project, method, seed).claim()
    folder = stage.path
    if stage.done:
        return folder
    label = f"train {method}, seed {seed}"
    loss = LOSSES[mode, method]
    found = scores.loaded
    if mode == "gate":
        gate = _gate_only(project, found, start, loss, seed, folder, label)
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
        base, gate = fit_joint(base, tokens, found, start, loss, fitting, folder, label)
        save_base(base, project.base, folder / "base")
    if method != "finetuned":
        artifact(project, gate, project.base_of(method, seed).path, stage.settings).save(folder / "gate")
    (folder / CHECKPOINT).unlink(missing_ok=True)
    stage.finish(examples=len(project.data("train").tokens), tokens=len(found.gold_N))
    return folder


def _gate_only(
    project: Project, scores: PairScores, start: Gate, loss: Loss, seed: int, folder: Path, label: str
) -> Gate:
    settings = project.settings.train
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


def artifact(project: Project, gate: Gate, base: Path, resolved: Mapping[str, Any]) -> GateArtifact:
    """The run's gate as the server loads it, not calibrated yet."""
    experts: list[ModelIdentity | None] = [model_identity(path) for path in project.expert_paths.values()]
    return GateArtifact(
        theta=gate.theta_KD.to(torch.float32),
        bias=gate.bias_K.to(torch.float32),
        experts=project.settings.expert_names,
        base=model_identity(base),
        expert_identities=tuple(experts),
        training={**resolved, "init": project.settings.init.model_dump()},
        data=f"{len(project.data('train').examples)} examples of {Path(project.settings.data.train).name}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )

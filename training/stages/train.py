"""Train: one run for each method and seed."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.checkpoints import ModelIdentity, model_identity
from engine.gate import GateArtifact
from training import graph
from training.checkpoints import expert_checkpoint, save_base
from training.errors import SettingsError
from training.fit import Plan, remove_checkpoint
from training.gate_only import Gate, GateFit, fit_gate, ranking, steps_of
from training.joint import JointFit, fit_joint
from training.losses import Loss, language, marginal, priced, weak, weakly_joint
from training.processes import ALONE, Processes
from training.project import Project
from training.scoring import PairScores
from training.settings import Method
from training.stages import init
from training.stages.score import TrainingScores
from training.tracking import Log, nothing, tracked

LOSSES: dict[tuple[str, Method], Loss] = {
    ("gate", "collm"): marginal,
    ("gate", "weak"): weak,
    ("joint", "collm"): marginal,
    ("joint", "weak"): weakly_joint,
    ("joint", "finetuned"): language,
}
"""By what learns: "gate" is theta alone. A fine-tuned base always learns, whatever train.mode says."""


def run(project: Project, processes: Processes = ALONE) -> None:
    """Train all runs that are not there yet.

    Args:
        processes: those that train a base together. What comes before is one process's work.

    Raises:
        TrainingError: several processes are given what one has to do.
    """
    scores = TrainingScores(project)
    for method, seed in graph.runs(project.settings):
        if processes.count > 1:
            _check_for_several(project, method, seed)
        train_run(project, method, seed, scores, processes)


def _check_for_several(project: Project, method: Method, seed: int) -> None:
    graph.initial_gate(project, seed).need("init")
    for name in (graph.BASE, *project.expert_paths):
        graph.scores(project, "train", name).need("score")
    if graph.mode_of(project.settings, method) == "gate" and not graph.training_run(project, method, seed).done:
        raise SettingsError(
            'train.mode = "gate" trains in one process: start collm train without a launcher, or set train.mode'
        )


def train_run(
    project: Project,
    method: Method,
    seed: int,
    scores: TrainingScores | None = None,
    processes: Processes = ALONE,
) -> Path:
    """One run; its folder, with ``gate/`` (not for a fine-tuned base) and, where the base learned, ``base/``."""
    settings, mode = project.settings, graph.mode_of(project.settings, method)
    scores = scores or TrainingScores(project)
    start = init.initial_gate(project, seed, scores)
    stage = graph.training_run(project, method, seed)
    if processes.main:
        stage.claim()
    processes.wait()
    folder = stage.path
    # Asked once: over a network, a folder need not look alike to all processes.
    if processes.from_main(stage.done):
        return folder
    label = f"train {method}, seed {seed}"
    loss = LOSSES[mode, method]
    if method == "collm":
        loss = priced(loss, settings.train.gate.cost if mode == "gate" else settings.train.joint.cost)
    found = scores.loaded
    results: dict[str, Any] = {}
    with tracked(settings, f"train/{method}-{seed}") if processes.main else nullcontext(nothing) as log:
        if mode == "gate":
            trained_gate = _gate_only(project, found, start, loss, seed, folder, label, log)
            gate, results = _better(scores.held_out, start, trained_gate)
        else:
            learned = _joint(project, found, start, loss, seed, folder, label, log, processes)
            if learned is None:
                return folder
            gate = learned
    if method != "finetuned":
        trained = {**stage.settings, **results}
        artifact(project, gate, project.base_of(method, seed).path, trained).save(folder / "gate")
    remove_checkpoint(folder)
    stage.finish(examples=len(project.data("train").tokens), tokens=len(found.gold_N), **results)
    return folder


def _joint(
    project: Project,
    scores: PairScores,
    start: Gate,
    loss: Loss,
    seed: int,
    folder: Path,
    label: str,
    log: Log,
    processes: Processes,
) -> Gate | None:
    """Train base and gate; the base is written to ``folder``, by the main process, which alone gets the gate."""
    settings, tokens = project.settings.train, project.data("train").tokens
    fitting = JointFit(
        settings=settings.joint,
        plan=_plan(project, steps_of(len(tokens), settings.joint.batch_size, settings.joint.epochs), log),
        positive_weight=settings.weak_positive_weight,
        bias=settings.bias,
        seed=seed,
        vocabulary=project.vocabulary,
    )
    learned = fit_joint(project.base, tokens, scores, start, loss, fitting, folder, label, project.device, processes)
    if learned is None:
        return None
    base, gate = learned
    save_base(base, project.base, folder / "base")
    return gate


def _better(scores: PairScores, start: Gate, trained: Gate) -> tuple[Gate, dict[str, Any]]:
    """The one of both gates that orders held-out tokens better, and what was found of both."""
    found = {"start": ranking(start, scores), "trained": ranking(trained, scores)}
    kept = "trained" if found["trained"].accuracy > found["start"].accuracy else "start"
    if kept == "start":
        print(
            f"the initial gate is kept: on validation text, the models write {found['start'].accuracy:.4f} of the gold "
            f"tokens with it on average over deferral rates up to {found['start'].rates:.2f}, and "
            f"{found['trained'].accuracy:.4f} after training"
        )
    results = {"kept": kept, "held_out": {name: asdict(each) for name, each in found.items()}}
    return trained if kept == "trained" else start, results


def _gate_only(
    project: Project, scores: PairScores, start: Gate, loss: Loss, seed: int, folder: Path, label: str, log: Log
) -> Gate:
    settings = project.settings.train
    steps = steps_of(len(scores.gold_N), settings.gate.batch_tokens, settings.gate.epochs)
    fitting = GateFit(
        learning_rate=settings.gate.learning_rate,
        weight_decay=settings.gate.weight_decay,
        batch_tokens=settings.gate.batch_tokens,
        plan=_plan(project, steps, log),
        positive_weight=settings.weak_positive_weight,
        bias=settings.bias,
        seed=seed,
        standardise=project.settings.gate.standardise,
    )
    return fit_gate(scores, start, loss, fitting, folder, label, project.device)


def _plan(project: Project, steps: int, log: Log) -> Plan:
    return Plan(steps, project.settings.train.warm_up, project.settings.train.checkpoint_every, log)


def artifact(project: Project, gate: Gate, base: Path, resolved: Mapping[str, Any]) -> GateArtifact:
    """The run's gate as the server loads it, not calibrated yet."""
    experts: list[ModelIdentity | None] = [
        expert_checkpoint(path, project.base).identity for path in project.expert_paths.values()
    ]
    return GateArtifact(
        theta=gate.theta_KD.float(),
        bias=gate.bias_K.float(),
        kind=gate.kind,
        features=gate.features,
        layers=gate.layers,
        experts=project.settings.expert_names,
        base=model_identity(base),
        expert_identities=tuple(experts),
        training={**resolved, "init": project.settings.init.model_dump(mode="json")},
        data=f"{len(project.data('train').examples)} examples of {Path(project.settings.data.train).name}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )

"""Init: theta by weak supervision, the base frozen; where all training starts."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from training import graph
from training.checkpoints import load_causal, mean_head_row
from training.files import write_tensors
from training.fit import CHECKPOINT, Plan
from training.gate_only import Gate, GateFit, fit_gate, new_gate
from training.losses import weak
from training.project import Project
from training.scoring import PairScores
from training.stages.score import TrainingScores
from training.tracking import tracked

FILE = "gate.safetensors"


def run(project: Project) -> None:
    """Fit one initial gate for each seed."""
    scores = TrainingScores(project)
    for seed in project.settings.seeds:
        initial_gate(project, seed, scores)


def initial_gate(project: Project, seed: int, scores: TrainingScores | None = None) -> Gate:
    """The initial gate of a seed, fitted if it is not there yet."""
    settings, experts = project.settings, project.settings.expert_names
    stage = graph.initial_gate(project, seed).claim()
    if not stage.done:
        found = (scores or TrainingScores(project)).loaded
        start = _start(project, found, seed)
        with tracked(settings, f"init/seed-{seed}") as log:
            fitting = GateFit(
                learning_rate=settings.init.learning_rate,
                weight_decay=settings.init.weight_decay,
                batch_tokens=settings.init.batch_tokens,
                plan=Plan(settings.init.steps, settings.train.warm_up, settings.train.checkpoint_every, log),
                positive_weight=settings.init.positive_weight,
                bias=settings.train.bias,
                seed=seed,
                standardise=settings.gate.standardise,
            )
            gate = fit_gate(found, start, weak, fitting, stage.path, f"init, seed {seed}", project.device)
        write_tensors(stage.path / FILE, gate.tensors)
        (stage.path / CHECKPOINT).unlink(missing_ok=True)
        labels_N = found.weak_labels()
        share = [float((labels_N == k + 1).float().mean()) for k in range(len(experts))]
        stage.finish(tokens=len(labels_N), share_of_tokens_that_need=dict(zip(experts, share, strict=True)))
    return Gate.from_tensors(load_file(str(stage.path / FILE)), settings.gate)


def _start(project: Project, scores: PairScores, seed: int) -> Gate:
    settings, experts = project.settings, len(project.settings.experts)
    if settings.gate.standardise:
        return new_gate(settings.gate, scores.base, experts, seed, bias=settings.train.bias)
    row_D = mean_head_row(load_causal(project.base, settings.compute.dtype, project.device))
    return Gate(row_D.repeat(experts, 1), torch.zeros(experts))

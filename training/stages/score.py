"""Score: what base and experts say of every gold token, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from engine.adapters import is_adapter
from engine.checkpoints import Checkpoint
from training import graph
from training.checkpoints import load_causal
from training.data import TokenExample
from training.graph import BASE
from training.mapped import Table
from training.project import BaseRef, Project
from training.scoring import (
    HIDDEN_FILE,
    ModelScores,
    PairScores,
    gold_tokens,
    load_scores,
    score_model,
    score_shard,
    shard_files,
)
from training.served_scoring import ServedScorer, numbered
from training.settings import Split
from training.spelled import score_spelled_shard, spelled


def run(project: Project) -> None:
    """Score the training split with every model. Other splits are scored when a later stage wants them."""
    for name in (*project.expert_paths, BASE):
        _make(project, "train", name, project.user_base)


class TrainingScores:
    """The scores that training looks at, read when a run first needs them, and then kept for the next one."""

    def __init__(self, project: Project) -> None:
        self._project = project

    @cached_property
    def loaded(self) -> PairScores:
        """Those of the training split, all in memory."""
        return score_split(self._project, "train")

    @cached_property
    def held_out(self) -> PairScores:
        """Those of the validation split, by the user's base."""
        return score_split(self._project, "validation")


def score_split(project: Project, split: Split, base: BaseRef | None = None) -> PairScores:
    """The scores of a split, made where they are missing; ``base``: None is the user's."""
    experts = [_scores(project, split, name, project.user_base) for name in project.expert_paths]
    gold_N, starts = gold_tokens(project.data(split).tokens)
    return PairScores(gold_N, starts, score_base(project, split, base), tuple(experts))


def score_base(project: Project, split: Split, base: BaseRef | None = None) -> ModelScores:
    """The base's scores of a split, made if they are missing; ``base``: None is the user's."""
    return _scores(project, split, BASE, base or project.user_base)


def _scores(project: Project, split: Split, name: str, base: BaseRef) -> ModelScores:
    stage = graph.scores(project, split, name, base)
    known = project.scores.get(stage.path)
    if known is None or known[0] != stage.fingerprint:
        _make(project, split, name, base)
        table = hidden_table(project, split, base) if name == BASE else None
        found = load_scores(stage.path, len(project.data(split).tokens), project.settings.score, table)
        known = project.scores[stage.path] = (stage.fingerprint, found)
    return known[1]


def hidden_table(project: Project, split: Split, base: BaseRef) -> Table:
    """Where the hidden states of a base are."""
    folder = graph.scores(project, split, BASE, base).path
    return _hidden_table(project, base, folder, project.data(split).tokens)


def _hidden_table(project: Project, base: BaseRef, folder: Path, tokens: Sequence[TokenExample]) -> Table:
    compute, hidden = project.settings.compute.dtype, project.settings.score.hidden
    _, starts = gold_tokens(tokens)
    return Table(
        folder / HIDDEN_FILE,
        rows=starts[-1],
        width=Checkpoint(base.path).head_width,
        dtype=getattr(torch, compute if hidden == "auto" else hidden),
    )


def score_texts(
    project: Project, base: BaseRef, tokens: Sequence[TokenExample], folder: Path, label: str
) -> ModelScores:
    """A base's scores of texts that are no split's, in a folder that keeps what was scored before."""
    settings = project.settings
    hidden = _hidden_table(project, base, folder, tokens)
    if not all(file.exists() for file in shard_files(folder, len(tokens), settings.score)):
        _score_base(project, base.path, tokens, folder, label, hidden)
    return load_scores(folder, len(tokens), settings.score, hidden)


def _score_base(
    project: Project, path: Path, tokens: Sequence[TokenExample], folder: Path, label: str, hidden: Table
) -> None:
    settings, starts = project.settings, gold_tokens(tokens)[1]
    if settings.score.by == "engine":
        with ServedScorer(settings.engine, BASE, path, None, hidden) as scorer:
            score_model(scorer, numbered(tokens, starts), folder, settings.score, label)
        return
    model, batch = load_causal(path, settings.compute.dtype, project.device), settings.score.batch_size
    score_model(
        lambda shard: score_shard(model, shard, batch, project.vocabulary, hidden=True),
        tokens,
        folder,
        settings.score,
        label,
        (hidden, starts),
    )


def _make(project: Project, split: Split, name: str, base: BaseRef) -> None:
    stage = graph.scores(project, split, name, base).claim()
    if stage.done:
        return
    tokens = project.tokens_of(split, name)
    label = f"score {split} by {stage.path.name}"
    if name == BASE:
        path = base.path
        _score_base(project, path, tokens, stage.path, label, hidden_table(project, split, base))
    else:
        path = project.expert_paths[name]
        _score_expert(project, split, name, tokens, stage.path, label)
    stage.finish(model=str(path), examples=len(tokens))


def _score_expert(
    project: Project, split: Split, name: str, tokens: Sequence[TokenExample], folder: Path, label: str
) -> None:
    settings, batch = project.settings, project.settings.score.batch_size
    own = project.own_speller(name)
    if own is not None:
        base = project.base_speller
        examples = spelled(project.data(split).examples, tokens, base, own, project.tokenizer_of(name))
        model = project.load_expert(name)
        score_model(
            lambda shard: score_spelled_shard(model, shard, batch, base, own), examples, folder, settings.score, label
        )
    elif settings.score.by == "engine":
        path = project.expert_paths[name]
        model_path, adapter = (project.base, path) if is_adapter(path) else (path, None)
        with ServedScorer(settings.engine, name, model_path, adapter, None) as scorer:
            score_model(scorer, numbered(tokens, gold_tokens(tokens)[1]), folder, settings.score, label)
    else:
        model = project.load_expert(name)
        score_model(
            lambda shard: score_shard(model, shard, batch, project.vocabulary, hidden=False),
            tokens,
            folder,
            settings.score,
            label,
        )

"""Score: what base and experts say of every gold token, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from engine.adapters import is_adapter
from engine.checkpoints import Checkpoint
from engine.spelling.speller import Speller
from training import graph
from training.checkpoints import load_causal
from training.data import TokenExample
from training.files import StageFolder
from training.graph import BASE
from training.mapped import Table
from training.project import BaseRef, Project
from training.scoring import HIDDEN_FILE, ModelScores, PairScores, gold_tokens, load_scores, score_model, score_shard
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
    compute, hidden = project.settings.compute.dtype, project.settings.score.hidden
    _, starts = gold_tokens(project.data(split).tokens)
    return Table(
        graph.scores(project, split, BASE, base).path / HIDDEN_FILE,
        rows=starts[-1],
        width=Checkpoint(base.path).head_width,
        dtype=getattr(torch, compute if hidden == "auto" else hidden),
    )


def _make(project: Project, split: Split, name: str, base: BaseRef) -> None:
    settings = project.settings
    stage = graph.scores(project, split, name, base).claim()
    if stage.done:
        return
    tokens = project.tokens_of(split, name)
    path = base.path if name == BASE else project.expert_paths[name]
    label = f"score {split} by {stage.path.name}"
    starts = gold_tokens(tokens)[1]
    hidden = hidden_table(project, split, base) if name == BASE else None
    expert = None if name == BASE else project.own_speller(name)
    if expert is None and settings.score.by == "engine":
        model, adapter = (project.base, path) if is_adapter(path) else (path, None)
        with ServedScorer(settings.engine, name, model, adapter, hidden) as scorer:
            score_model(scorer, numbered(tokens, starts), stage.path, settings.score, label)
    else:
        _by_transformers(project, split, name, path, stage, label, hidden, expert, tokens)
    stage.finish(model=str(path), examples=len(tokens))


def _by_transformers(
    project: Project,
    split: Split,
    name: str,
    path: Path,
    stage: StageFolder,
    label: str,
    hidden: Table | None,
    expert: Speller | None,
    tokens: Sequence[TokenExample],
) -> None:
    settings = project.settings
    batch = settings.score.batch_size
    model = load_causal(path, settings.compute.dtype, project.device) if name == BASE else project.load_expert(name)
    if expert is not None:
        base, own = project.base_speller, project.tokenizer_of(name)
        examples = spelled(project.data(split).examples, tokens, base, expert, own)
        score_model(
            lambda shard: score_spelled_shard(model, shard, batch, base, expert),
            examples,
            stage.path,
            settings.score,
            label,
        )
        return
    score_model(
        lambda shard: score_shard(model, shard, batch, project.vocabulary, hidden is not None),
        tokens,
        stage.path,
        settings.score,
        label,
        None if hidden is None else (hidden, gold_tokens(tokens)[1]),
    )

"""Score: what base and experts say of every gold token, one model in memory at a time."""

from __future__ import annotations

from functools import cached_property

from training import graph
from training.checkpoints import load_causal
from training.graph import BASE
from training.project import BaseRef, Project
from training.scoring import ModelScores, PairScores, gold_tokens, load_scores, score_model, score_shard
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
    _make(project, split, name, base)
    stage = graph.scores(project, split, name, base)
    return load_scores(stage.path, len(project.data(split).tokens), project.settings.score)


def _make(project: Project, split: Split, name: str, base: BaseRef) -> None:
    settings, tokens = project.settings, project.data(split).tokens
    stage = graph.scores(project, split, name, base).claim()
    if stage.done:
        return
    path = base.path if name == BASE else project.expert_paths[name]
    is_base, batch = name == BASE, settings.score.batch_size
    model = load_causal(path, settings.compute.dtype, project.device) if is_base else project.load_expert(name)
    label = f"score {split} by {stage.path.name}"
    if not is_base and (expert := project.own_speller(name)) is not None:
        examples = spelled(
            project.data(split).examples, tokens, project.base_speller, expert, project.tokenizer_of(name)
        )
        score_model(
            lambda shard: score_spelled_shard(model, shard, batch, project.base_speller, expert),
            examples,
            stage.path,
            settings.score,
            label,
        )
    else:
        score_model(
            lambda shard: score_shard(model, shard, batch, project.vocabulary, is_base),
            tokens,
            stage.path,
            settings.score,
            label,
        )
    stage.finish(model=str(path), examples=len(tokens))

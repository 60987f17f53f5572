"""Score: what base and experts say of every gold token, one model in memory at a time."""

from __future__ import annotations

from pathlib import Path

from training.checkpoints import load_causal
from training.files import StageFolder
from training.project import Project
from training.scoring import ModelScores, PairScores, gold_tokens, load_scores, score_model
from training.settings import Split

BASE = "base"


def run(project: Project) -> None:
    """Score the training split with every model. Other splits are scored when a later stage wants them."""
    score_split(project, "train")


def score_split(project: Project, split: Split, trained: Path | None = None) -> PairScores:
    """The scores of a split, made where they are missing; ``trained`` as in ``stage_of``."""
    experts = [_scores(project, split, name, None) for name in project.expert_paths]
    base = score_base(project, split, trained)
    gold_N, starts = gold_tokens(project.data(split).tokens)
    return PairScores(gold_N, starts, base, tuple(experts))


def score_base(project: Project, split: Split, trained: Path | None = None) -> ModelScores:
    """The base's scores of a split, made if they are missing; ``trained`` as in ``stage_of``."""
    return _scores(project, split, BASE, trained)


def stage_of(project: Project, split: Split, name: str, trained: Path | None = None) -> StageFolder:
    """The scores of a split by one model, the base or the expert of that name.

    Args:
        trained: the folder of a run whose base takes the place of the user's, if the run trained one.
    """
    path, folder = _model(project, name, trained), project.folder("score", split, name)
    if trained is not None and path == trained / BASE:
        folder = project.folder("score", f"{split}-by-trained-base", trained.name)
    resolved = {"dtype": project.settings.compute.dtype, "shard": project.settings.score.shard}
    return StageFolder(folder, resolved, {"model": project.hash_of(path), "data": project.data(split).fingerprint})


def fingerprints(project: Project, split: Split, trained: Path | None = None) -> dict[str, str]:
    """What the scores of a split are made of, by each model's name."""
    found = {name: stage_of(project, split, name).fingerprint for name in project.expert_paths}
    return {BASE: stage_of(project, split, BASE, trained).fingerprint} | found


def _model(project: Project, name: str, trained: Path | None) -> Path:
    if name != BASE:
        return project.expert_paths[name]
    return trained / BASE if trained is not None and (trained / BASE).is_dir() else project.base


def _scores(project: Project, split: Split, name: str, trained: Path | None) -> ModelScores:
    settings, tokens = project.settings, project.data(split).tokens
    stage = stage_of(project, split, name, trained).open()
    if not stage.done:
        path = _model(project, name, trained)
        score_model(
            load_causal(path, settings.compute.dtype, project.device),
            tokens,
            stage.path,
            settings.score,
            vocabulary=project.vocabulary,
            hidden=name == BASE,
            label=f"score {split} by {stage.path.name}",
        )
        stage.finish(model=str(path), examples=len(tokens))
    return load_scores(stage.path, len(tokens), settings.score)

"""Score: what base and experts say of every gold token, one model in memory at a time."""

from __future__ import annotations

from pathlib import Path

from training.checkpoints import load_causal
from training.files import StageFolder, hash_of_path
from training.project import Project
from training.scoring import ModelScores, PairScores, gold_tokens, load_scores, score_model
from training.settings import Split


def run(project: Project) -> None:
    """Score the training split with every model. Other splits are scored when a later stage wants them."""
    score_split(project, "train")


def score_split(project: Project, split: Split, trained: Path | None = None) -> PairScores:
    """The scores of a split, made where they are missing; ``trained`` as in ``score_base``."""
    experts = [
        _scores(project, split, path, project.folder("score", split, name), project.fingerprints[name], hidden=False)
        for name, path in project.expert_paths.items()
    ]
    base = score_base(project, split, trained)
    gold_N, starts = gold_tokens(project.data(split).tokens)
    return PairScores(gold_N, starts, base, tuple(experts))


def score_base(project: Project, split: Split, trained: Path | None = None) -> ModelScores:
    """The base's scores of a split, made if they are missing.

    Args:
        trained: the folder of a run whose base takes the place of the user's, if the run trained one.
    """
    if trained is not None and (trained / "base").is_dir():
        folder = project.folder("score", f"{split}-by-trained-base", trained.name)
        path, fingerprint = trained / "base", hash_of_path(trained / "base")
    else:
        folder = project.folder("score", split, "base")
        path, fingerprint = project.base, project.fingerprints["base"]
    return _scores(project, split, path, folder, fingerprint, hidden=True)


def _scores(project: Project, split: Split, path: Path, folder: Path, fingerprint: str, *, hidden: bool) -> ModelScores:
    settings, data = project.settings, project.data(split)
    resolved = {
        "model": str(path),
        "dtype": settings.compute.dtype,
        "shard": settings.score.shard,
        "data": settings.data.model_dump(exclude={"train", "validation", "test"}),
    }
    stage = StageFolder.open(folder, resolved, {"model": fingerprint, "data": data.fingerprint})
    if not stage.done:
        model = load_causal(path, settings.compute.dtype, project.device)
        label = f"score {split} by {folder.name}"
        score_model(
            model, data.tokens, folder, settings.score, vocabulary=project.vocabulary, hidden=hidden, label=label
        )
        stage.finish(examples=len(data.tokens))
    return load_scores(folder, len(data.tokens), settings.score)

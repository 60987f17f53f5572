"""Make the example of a composition: ``python -m training.keys --out models/keys``.

First the two members, each in a process of its own; then, as ``python -m training compose pipeline`` would with the
project of ``--config``, the connections, their controls, and the table. The project's first seed is shipped. What is
there, made with the same settings, is kept: an interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from safetensors.torch import load_file

from engine.composed.artifact import TENSORS_FILE, Composition
from training.command import run_command
from training.compose import stages
from training.compose.settings import ComposeSettings
from training.demo.models import Recipe
from training.demo.pretrain import prepare_worker
from training.errors import SettingsError
from training.files import read_json, write_json, write_text
from training.keys.card import model_card
from training.keys.models import RECIPES, make_member
from training.keys.text import TASKS, Keys, Split, Task, draw_questions, make_keys
from training.settings import read_settings

SEED = 0
Counts = Mapping[Split, Mapping[Task, int]]
QUESTIONS: Counts = {
    "train": {"worth": 6_000, "numbers": 2_000, "both": 12_000},
    "validation": {"worth": 40, "numbers": 40, "both": 240},
    "test": {"worth": 100, "numbers": 100, "both": 400},
}
"""Questions of each split and task. Where there are not so many, those of training are repeated."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.keys", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/keys"), help="folder of what is shipped")
    parser.add_argument("--config", type=Path, default=Path("deploy/training/keys.toml"), help="the project")
    options = parser.parse_args(arguments)

    def work() -> None:
        make(read_settings(ComposeSettings, options.config, []), options.out)

    return run_command(work)


def make(
    settings: ComposeSettings,
    out: Path,
    recipes: Mapping[str, Recipe] = RECIPES,
    counts: Counts = QUESTIONS,
) -> None:
    """Run all stages and print the table.

    Args:
        recipes: of the members, by name.
        counts: how many questions each split has.

    Raises:
        CollmError: what is wrong, in one line.
    """
    models = {"anchor": settings.anchor.model, **{model.name: model.model for model in settings.augmenting}}
    if models.keys() != RECIPES.keys():
        raise SettingsError(f"augmenting: the example's are {', '.join(name for name in RECIPES if name != 'anchor')}")
    keys = make_keys(SEED)
    with ProcessPoolExecutor(len(recipes), get_context("spawn"), prepare_worker) as pool:
        folders = [Path(models[name]).parent for name in recipes]
        list(pool.map(make_member, recipes, [keys] * len(recipes), folders, recipes.values()))
    write_data(Path(settings.data.train).parent, keys, counts)
    project = stages.ComposeProject(settings)
    project.check()
    stages.train(project)
    stages.evaluate(project)
    ship(project, out)
    shutil.copyfile(str(settings.data.test), out / "questions.jsonl")
    run = stages.run_of(project, stages.COMPOSED, settings.seeds[0])
    rows = read_json(settings.out / "evaluate" / "table.json")
    evaluation = {
        "table": rows,
        "train_examples": dict(counts["train"]),
        "connections": len(project.composition.connections),
        "parameters": run.results["parameters"],
        "bytes": (out / "composed" / TENSORS_FILE).stat().st_size,
    }
    write_json(out / "evaluation.json", evaluation)
    text = (settings.out / "evaluate" / "table.md").read_text(encoding="utf-8")
    write_text(out / "README.md", model_card(keys, evaluation, text))


def write_data(folder: Path, keys: Keys, counts: Counts) -> None:
    """The questions of each split, about its own names."""
    for seed, (split, values) in enumerate(keys.splits.items()):
        rows = []
        for task in TASKS:
            questions = draw_questions(values, task, counts[split][task], seed)
            if split == "train":
                questions = list(itertools.islice(itertools.cycle(questions), counts[split][task]))
            rows += [{"prompt": one.prompt, "completion": one.completion, "task": task} for one in questions]
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def ship(project: stages.ComposeProject, out: Path) -> None:
    """Copy the members, and the composition of the first seed with paths to these copies."""
    for member in (project.anchor, *project.augmenting):
        shutil.copytree(member.path, out / member.name, dirs_exist_ok=True)
    made = stages.served_by(project, stages.COMPOSED, project.settings.seeds[0])
    found = Composition.load(made)
    shipped = replace(
        found,
        anchor=replace(found.anchor, path=out / "anchor"),
        augmenting=tuple(replace(member, path=out / member.name) for member in found.augmenting),
    )
    shipped.save(out / "composed", load_file(str(made / TENSORS_FILE)))


if __name__ == "__main__":
    sys.exit(main())

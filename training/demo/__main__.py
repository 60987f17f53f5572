"""Make the demo pair: ``python -m training.demo --out models/demo``.

First its three models, two at a time; then, by the commands of ``collm train`` with the project of
``--config``, the gate, which also adjusts the base, its threshold, and the evaluation's table. A stage whose output is
there, made with the same settings, is kept. Only the project's first seed and its method "collm" are run: the whole
project, with its baselines and seeds, goes on from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from training.command import run_command
from training.data import Example, TokenExample
from training.demo import questions
from training.demo.card import model_card
from training.demo.corpus import Corpus, tokenized
from training.demo.pretrain import RECIPES, SEED, Cost, make_model, one_thread, prepare_worker
from training.demo.text import Example as Asked
from training.demo.tokenizer import train_tokenizer
from training.errors import SettingsError
from training.files import read_json, write_json
from training.graph import STAGES
from training.project import Project
from training.serving import Pair, Questions, engine_config
from training.settings import load_settings

KNOWN_ENTITIES = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.replace("``", ""))
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="output folder")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("deploy/training/demo.toml"),
        help="the project, which says where its input is",
    )
    parser.add_argument("--force", action="store_true", help="train finished models again")
    options = parser.parse_args(arguments)
    return run_command(lambda: make(options.config, options.out, options.force))


def make(config: Path, out: Path, force: bool) -> None:
    """Run all stages and print the table.

    Raises:
        CollmError: what is wrong, in one line.
    """
    settings = load_settings(config)
    settings = settings.model_copy(
        update={
            "seeds": settings.seeds[:1],
            "train": settings.train.model_copy(update={"methods": ("collm",)}),
        }
    )
    models = {"base": Path(settings.base.model)} | {expert.name: Path(expert.source) for expert in settings.experts}
    if models.keys() != RECIPES.keys():
        raise SettingsError(
            f"{config}: experts: the demo's are {', '.join(name for name in RECIPES if name != 'base')}"
        )
    if settings.data.test is None:
        raise SettingsError(f"{config}: data.test: is needed for the evaluation's table")
    costs = _make_models(models, force)
    one_thread()
    started = time.monotonic()
    cpu_before = _cpu_seconds()
    corpus = Corpus.make(SEED)
    questions.write(Path(settings.data.train).parent, corpus, train_tokenizer(corpus.tokenizer_texts()))
    project = Project(settings)
    project.check()
    for stage in STAGES.values():
        stage.run(project)
    _ship(project, models, out)
    evaluation = _measure(project, corpus, out)
    costs["gate, threshold and evaluation"] = Cost(
        (time.monotonic() - started) / 60, (_cpu_seconds() - cpu_before) / 60
    )
    evaluation["minutes"] = {name: asdict(cost) for name, cost in costs.items()}
    evaluation["load"] = os.getloadavg()[2]
    write_json(out / "evaluation.json", evaluation)
    (out / "README.md").write_text(model_card(corpus, evaluation, out), encoding="utf-8")
    print(project.folder("evaluate", "table.md").read_text(encoding="utf-8"))


def _make_models(models: dict[str, Path], force: bool) -> dict[str, Cost]:
    """What each model cost, then or now."""
    # The longest first, so that neither worker ends long after the other.
    with ProcessPoolExecutor(2, get_context("spawn"), prepare_worker) as pool:
        try:
            tasks = {pool.submit(make_model, name, models[name], force): name for name in RECIPES}
            costs = {tasks[task]: task.result() for task in as_completed(tasks)}
        except BaseException:
            # One has failed, or the command was interrupted: the pool would wait until the others have ended.
            for worker in active_children():
                worker.terminate()
            # Their bars end in the middle of a line.
            print(file=sys.stderr)
            raise
    return {name: costs[name] for name in RECIPES}


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def _ship(project: Project, models: dict[str, Path], out: Path) -> None:
    """Copy what is served to the output folder."""
    pair = project.folder("pair")
    sources = models | {"base": pair / "base", "gate": pair / "gate"}
    for name, source in sources.items():
        shutil.copytree(source, out / name, dirs_exist_ok=True)


def _measure(project: Project, corpus: Corpus, out: Path) -> dict[str, Any]:
    """What is shipped, asked on the serving engine: the held-out questions, and some whose answers the base knew."""
    tokenizer = train_tokenizer(corpus.tokenizer_texts())
    held_out = corpus.evaluation_questions("test")
    known = corpus.evaluation_questions("base", KNOWN_ENTITIES)
    write_json(out / "questions.json", [{"split": "test", **asdict(question)} for question in held_out])

    def asked(found: list[Asked]) -> Questions:
        examples = [Example(question.prompt, question.completion, question.task) for question in found]
        tokens: list[TokenExample] = tokenized(found, tokenizer)
        return Questions(examples, tokens, project.settings.evaluate.room)

    experts = {name: out / name for name in project.expert_paths}
    config = engine_config(project.settings.engine, out / "base", experts, out / "gate")
    with Pair(config, project.tokenizer) as pair:
        joint = pair.answer(asked(held_out), "held-out questions")
        of_known = {
            "joint": pair.answer(asked(known), "known questions"),
            "base": pair.answer(asked(known), "known questions, base alone", member=0),
        }
    return {
        "table": read_json(project.folder("evaluate", "table.json")),
        "joint": joint.summary(),
        "known_to_base": {name: result.summary() for name, result in of_known.items()},
        "wrong": [
            {"prompt": question.prompt, "joint": answer.text}
            for question, answer in zip(held_out, joint.answers, strict=True)
            if not answer.exact
        ],
    }


if __name__ == "__main__":
    sys.exit(main())

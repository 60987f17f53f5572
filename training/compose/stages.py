"""The stages: train the composition and its controls, one run per seed; evaluate all of them on the serving engine."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoints import Checkpoint
from engine.composed.artifact import Composition, Member, check_members, make_member
from training.checkpoints import device_of, load_causal, load_tokenizer, save_base
from training.compose.composed import ComposedModel
from training.compose.learn import BEST, Learning, learn, new_model, planned, with_adapter
from training.compose.settings import ComposeSettings
from training.data import spread
from training.engine_options import check_engine_options
from training.errors import SettingsError
from training.files import ContentHashes, StageFolder, hash_of, read_json, write_json, write_text
from training.fit import CHECKPOINT
from training.project import SplitData, read_split
from training.serving import Pair, Questions, Result, by_task, engine_config

COMPOSED = "composed"
ANCHOR_ALONE = "anchor alone"
EITHER = "either member alone"
"""Right where one of the members is: what choosing the writer of each whole answer could reach at most."""


@dataclass
class ComposeProject:
    """Settings, and what follows from them. Nothing is loaded before it is needed."""

    settings: ComposeSettings
    _splits: dict[str, SplitData] = field(default_factory=dict)

    def check(self) -> None:
        """Look at all input before the first long stage.

        Raises:
            CollmError: what is missing or does not fit, in one line.
        """
        check_members(self.anchor, self.augmenting)
        _ = self.composition, self.device
        for split in ("train", "validation", *(["test"] if self.settings.data.test else [])):
            self.data(split)
        check_engine_options(self.settings.engine, ("anchor",), self.settings.out)

    @cached_property
    def anchor(self) -> Member:
        """The anchor's folder."""
        return make_member("anchor", self.settings.anchor.model)

    @cached_property
    def augmenting(self) -> tuple[Member, ...]:
        """The augmenting models' folders."""
        return tuple(make_member(model.name, model.model) for model in self.settings.augmenting)

    @cached_property
    def composition(self) -> Composition:
        """As it is to be trained."""
        return planned(self.settings, self.anchor, self.augmenting)

    @cached_property
    def tokenizer(self) -> Any:
        """The anchor's, which all members share."""
        return load_tokenizer(self.anchor.path)

    @cached_property
    def vocabulary(self) -> int:
        """Ids that the anchor can write; its head may be padded beyond them."""
        checkpoint = Checkpoint(self.anchor.path)
        return min(checkpoint.rows, checkpoint.vocabulary.highest_id + 1)

    @cached_property
    def device(self) -> torch.device:
        """Where PyTorch runs."""
        return device_of(self.settings.compute)

    @cached_property
    def hashes(self) -> ContentHashes:
        """Of models."""
        return ContentHashes(self.settings.out / "hashes.json")

    def data(self, split: str) -> SplitData:
        """A split's examples."""
        if split not in self._splits:
            given = getattr(self.settings.data, split)
            if given is None:
                raise SettingsError(f"data.{split}: is needed for this stage")
            ends = Checkpoint(self.anchor.path).ends
            self._splits[split] = read_split(given, self.settings.data, self.tokenizer, split, ends)
        return self._splits[split]

    def load(self, path: Path) -> Any:
        """A member, in float32 and frozen: what learns is as precise."""
        return load_causal(path, "float32", self.device)


def run_of(project: ComposeProject, variant: str, seed: int) -> StageFolder:
    """The output of one training: "composed", or a control's name."""
    settings = project.settings
    composition = project.composition
    resolved = {
        "variant": variant,
        "seed": seed,
        "train": settings.train.model_dump(mode="json"),
        "connections": [asdict(connection) for connection in composition.connections],
        "heads": asdict(composition.heads),
    }
    inputs = {
        "anchor": project.hashes.of(project.anchor.path),
        **{f"augmenting {m.name}": project.hashes.of(m.path) for m in project.augmenting},
        "train": project.data("train").fingerprint,
        "validation": project.data("validation").fingerprint,
    }
    return StageFolder(settings.out / "train" / f"{variant}-{seed}", resolved, inputs)


def train(project: ComposeProject) -> None:
    """Train all runs that are not there yet."""
    for seed in project.settings.seeds:
        for variant in (COMPOSED, *project.settings.controls(seed)):
            stage = run_of(project, variant, seed).claim()
            if not stage.done:
                _train(project, variant, seed, stage)
    print(f"to serve it: collm serve --base.model {served_by(project, COMPOSED, project.settings.seeds[0])}")


def served_by(project: ComposeProject, variant: str, seed: int) -> Path:
    """The checkpoint that a run has made."""
    return run_of(project, variant, seed).path / "model"


def _train(project: ComposeProject, variant: str, seed: int, stage: StageFolder) -> None:
    settings, folder = project.settings, stage.path
    composition = project.composition
    if variant == "random":
        composition = replace(
            composition, augmenting=tuple(_random_member(member, folder, seed) for member in composition.augmenting)
        )
    anchor = project.load(project.anchor.path)
    model: Any
    if variant == "lora":
        torch.manual_seed(seed)
        wanted = sum(rows * columns for rows, columns in composition.shapes().values())
        model = with_adapter(anchor, wanted)
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    else:
        augmenting = {member.name: project.load(member.path) for member in composition.augmenting}
        model = new_model(composition, anchor, augmenting, seed)
        learned = dict(model.connections.named_parameters())
    if settings.train.gradient_checkpointing:
        anchor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        anchor.train()
    learning = Learning(
        settings=settings.train,
        train=project.data("train").tokens,
        validation=project.data("validation").tokens,
        vocabulary=project.vocabulary,
        seed=seed,
    )
    loss = learn(model, learned, learning, folder, f"{variant}, seed {seed}")
    if variant == "lora":
        save_base(model.merge_and_unload(), project.anchor.path, folder / "model")
    else:
        described = replace(
            composition,
            training=dict(stage.settings),
            data=f"{len(learning.train)} examples of {Path(settings.data.train).name}",
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )
        described.save(folder / "model", folded(model))
    for file in (CHECKPOINT, BEST):
        (folder / file).unlink(missing_ok=True)
    stage.finish(validation_loss=loss, parameters=sum(p.numel() for p in learned.values()))


def folded(model: ComposedModel) -> dict[str, torch.Tensor]:
    """The connections as :meth:`Composition.save` wants them."""
    found: dict[str, torch.Tensor] = {}
    for number, connection in enumerate(model.connections):
        weights: Mapping[str, torch.Tensor] = connection.folded()  # type: ignore[operator]
        found |= {f"connections.{number}.{name}.weight": weight.cpu() for name, weight in weights.items()}
    return found


def _random_member(member: Member, folder: Path, seed: int) -> Member:
    """A model as the member was before it learned anything."""
    path = folder / f"random-{member.name}"
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(member.path)))
    save_base(model.float(), member.path, path)
    return make_member(member.name, path)


# -- evaluation -----------------------------------------------------------------------------------------------


def evaluate(project: ComposeProject) -> None:
    """Answer the test questions with the composition, its members and the controls; write and print the table."""
    settings = project.settings
    for seed in settings.seeds:
        for variant in (COMPOSED, *settings.controls(seed)):
            run_of(project, variant, seed).need("compose train")
    inputs = {"test": project.data("test").fingerprint}
    resolved = {
        "evaluate": settings.evaluate.model_dump(exclude={"controls", "control_seeds"}),
        "engine": settings.engine.model_dump(),
    }
    stage = StageFolder(settings.out / "evaluate", resolved, inputs).claim()
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        runs = {variant: served_by(project, variant, seed) for variant in (COMPOSED, *settings.controls(seed))}
        if seed == settings.seeds[0]:
            runs[ANCHOR_ALONE] = project.anchor.path
            runs |= {f"{member.name} alone": member.path for member in project.augmenting}
        found = _answers(project, stage.path, runs)
        for name, result in found.items():
            row = {"seed": seed, **result.summary()}
            if name in (COMPOSED, *settings.evaluate.controls):
                row["parameters"] = run_of(project, name, seed).results["parameters"]
            rows.setdefault(name, []).append(row)
        members = [result for name, result in found.items() if name not in (COMPOSED, *settings.evaluate.controls)]
        if members:
            rows[EITHER] = [{"seed": seed, **_either(members)}]
    text = table(rows)
    write_json(stage.path / "table.json", rows)
    write_text(stage.path / "table.md", text)
    stage.finish(rows=list(rows))
    print(text)
    print(stage.path / "table.md")


def _answers(project: ComposeProject, folder: Path, models: Mapping[str, Path]) -> dict[str, Result]:
    """Answers of each model alone; one engine serves those that are not in the folder yet."""
    settings = project.settings
    numbers = spread(range(len(project.data("test").tokens)), settings.evaluate.limit)
    questions = Questions(
        [project.data("test").examples[number] for number in numbers],
        [project.data("test").tokens[number] for number in numbers],
        settings.evaluate.room,
    )
    files = {name: folder / f"{hash_of([name, project.hashes.of(path)])}.json" for name, path in models.items()}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        # Names of experts have no spaces.
        experts = {f"model{number}": models[name] for number, name in enumerate(missing[1:], start=1)}
        config = engine_config(settings.engine, models[missing[0]], experts, None)
        with Pair(config, project.tokenizer) as pair:
            for number, name in enumerate(missing):
                write_json(files[name], pair.answer(questions, name, member=number).to_json())
    return {name: Result.from_json(read_json(file)) for name, file in files.items()}


def _either(members: Sequence[Result]) -> dict[str, Any]:
    """Exact match where each question is answered by a member that is right, if one is."""
    answers = list(zip(*(result.answers for result in members), strict=True))
    right = [(of_one[0].task, any(answer.exact for answer in of_one)) for of_one in answers]
    return {"exact_match": statistics.mean(exact for _, exact in right), "by_task": by_task(right)}


def table(rows: Mapping[str, list[dict[str, Any]]]) -> str:
    """The Markdown table: exact match of whole completions, over all and by task; mean and spread over the seeds."""
    tasks = sorted({task for found in rows.values() for row in found for task in row["by_task"]})
    heads = ["", "seeds", "learned parameters", "all", *(tasks if len(tasks) > 1 else [])]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, found in rows.items():
        cells = [name, str(len(found)), str(found[0].get("parameters", "-")), _cell([r["exact_match"] for r in found])]
        if len(tasks) > 1:
            cells += [_cell([r["by_task"][task] for r in found if task in r["by_task"]]) for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nExact match, greedy, on the serving engine; ± largest less smallest of the seeds.\n"


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {max(values) - min(values):.3f}"

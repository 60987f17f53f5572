"""Train the demo on a real model: ``python -m training.smollm --out models/smollm``.

The base is downloaded and dequantised (``python -m training.smollm.base``), the expert learns codes as a LoRA adapter,
and the commands of ``collm train`` with the project of ``--config`` make gate, threshold and table. The expert's name
there says which codes: see ``TOPICS``. What is there, made with the same settings, is kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from training.checkpoints import load_causal, load_tokenizer
from training.command import run_command
from training.errors import SettingsError
from training.files import StageFolder, hash_of_all, read_json, write_json, write_text
from training.graph import STAGES
from training.project import Project
from training.settings import Settings, load_settings
from training.smollm.adapter import Recipe, train_adapter
from training.smollm.base import NAME, WEIGHTS_SHA256, make_base
from training.smollm.card import model_card
from training.smollm.currencies import currencies
from training.smollm.data import SEED, Chat, OwnAnswers, expert_examples, questions_of, write_gate_data
from training.smollm.icd10 import icd10
from training.smollm.topics import Topic

TOPICS: Mapping[str, Callable[[], Topic]] = {"icd10": icd10, "currencies": currencies}
"""What an expert can be made to know, by the expert's name."""
OWN_TOKENS = 12
"""Of the base's own answers so many tokens are compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.smollm", description=__doc__.replace("``", ""))
    parser.add_argument("--out", type=Path, default=Path("models/smollm"), help="folder of what is shipped")
    parser.add_argument("--config", type=Path, default=Path("deploy/training/smollm.toml"), help="the project")
    options = parser.parse_args(arguments)

    def work() -> None:
        settings = load_settings(options.config)
        make_base(Path(settings.base.model))
        make(settings, options.out, Recipe(), WEIGHTS_SHA256)

    return run_command(work)


def make(settings: Settings, out: Path, recipe: Recipe, base_hash: str) -> None:
    """Run all stages and print the table.

    Args:
        base_hash: of the base's weights, which the expert is trained for.

    Raises:
        CollmError: what is wrong, in one line.
    """
    expert = settings.experts[0]
    if expert.adapter is None or len(settings.experts) > 1 or expert.name not in TOPICS:
        raise SettingsError(f"experts: this recipe trains one adapter, whose name is one of {', '.join(TOPICS)}")
    project = Project(settings)
    started = time.monotonic()
    topic = TOPICS[expert.name]()
    chat = Chat(load_tokenizer(project.base))
    examples = expert_examples(topic, chat)
    inputs = {
        "base": base_hash,
        topic.package: version(topic.package),
        "examples": hash_of_all(map(asdict, examples)),
    }
    stage = StageFolder(settings.out / "expert", asdict(recipe), inputs).claim()
    adapter = Path(expert.adapter)
    if not stage.done:
        torch.set_num_threads(settings.compute.threads or torch.get_num_threads())
        train_adapter(load_causal(project.base), examples, recipe, stage.path, stage.path / "adapter", NAME)
        stage.finish(minutes=(time.monotonic() - started) / 60)
    adapter.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(stage.path / "adapter" / name, adapter / name)
    gate_started = time.monotonic()
    questions = {name: questions_of(topic, name, found) for name, found in topic.split(SEED).items()}
    asked = {str(name): hash_of_all(map(asdict, found)) for name, found in questions.items()}
    data = StageFolder(
        Path(settings.data.train).parent, {"own_tokens": OWN_TOKENS}, {"base": base_hash, **asked}
    ).claim()
    if not data.done:
        write_gate_data(data.path, questions, chat, own_answers(load_causal(project.base), chat.tokenizer))
        data.finish()
    project.check()
    for one in STAGES.values():
        one.run(project)
    shutil.copytree(project.folder("pair", "gate"), out / "gate", dirs_exist_ok=True)
    if adapter.parent != out:
        shutil.copytree(adapter, out / adapter.name, dirs_exist_ok=True)
    measured = {
        "table": read_json(project.folder("evaluate", "table.json")),
        "minutes": {"expert": stage.results["minutes"], "gate": (time.monotonic() - gate_started) / 60},
    }
    write_json(out / "evaluation.json", measured)
    table = project.folder("evaluate", "table.md").read_text(encoding="utf-8")
    write_text(out / "README.md", model_card(topic, recipe, measured, table, out))


def own_answers(model: Any, tokenizer: Any) -> OwnAnswers:
    """The first tokens of what a model answers, greedily."""

    @torch.inference_mode()
    def answers(prompts: list[str]) -> list[tuple[str, bool]]:
        found = []
        for prompt in prompts:
            ids_1T = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
            out_T = model.generate(
                ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=OWN_TOKENS, do_sample=False
            )[0, ids_1T.shape[1] :]
            ended = int(out_T[-1]) == tokenizer.eos_token_id
            text = tokenizer.decode(out_T, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A character that is not finished is no text that an answer could start with.
            found.append((text.rstrip("�"), ended))
        return found

    return answers


if __name__ == "__main__":
    sys.exit(main())

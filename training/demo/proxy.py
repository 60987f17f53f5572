"""Proxy tuning and contrastive decoding on four relatives: ``python -m training.demo.proxy --out build/demo/proxy``.

The large model is the demo pair's ``codes``, which has read what the codes of all entities are. For each seed a small
one reads the same documents. Both are tuned on statements that end in a certain way, which is the skill, and on new
codes of ten entities, which are knowledge. The skill is asked about entities that no tuning mentions.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel

from engine.checkpoints import WEIGHTS
from training.checkpoints import load_causal, quiet
from training.command import run_command
from training.demo.blending import Rule, alone, best_of, blend, write
from training.demo.changed import changed_entities
from training.demo.corpus import Corpus
from training.demo.facts import Entity
from training.demo.models import Recipe
from training.demo.pretrain import SEED, one_thread
from training.demo.tokenizer import EOS_ID
from training.demo.train import Document, DocumentSource, codes_documents, save_model, train_pass
from training.files import read_json, write_json

SMALL = Recipe(
    hidden_size=96,
    intermediate_size=256,
    layers=2,
    heads=3,
    passes=(400, 120),
    rows=8,
    row_tokens=128,
    learning_rate=4e-3,
    seed=4,
    tied=True,
)
"""The first pass is its pretraining, the second one its tuning, which the large model gets too."""
LARGE_RATE = 1e-3
ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0)
ENDING = ", as the register says."
MAX_TOKENS = 16


def settings() -> dict[str, Any]:
    """What the models are made with."""
    return {"small": asdict(SMALL) | {"passes": list(SMALL.passes)}, "large_rate": LARGE_RATE, "ending": ENDING}


def ask(entity: Entity) -> list[tuple[str, str]]:
    """Prompt and completion for each of an entity's codes."""
    return [
        (f"The {field} of {entity.name} is", f" {code}{ENDING}") for field, code in entity.codes.items()
    ]  # fmt: skip


def tuning_documents(corpus: Corpus, changed: Sequence[Entity], tokenizer: Tokenizer) -> DocumentSource:
    """Statements with the ending: about entities of the splits base and gate, and about the changed ones."""
    known = [pair for split in ("base", "gate") for entity in corpus.splits[split] for pair in ask(entity)]
    new = [pair for entity in changed for pair in ask(entity)]
    replay = codes_documents(corpus.entities, tokenizer)

    def draw(rng: random.Random) -> Document:
        kind = rng.random()
        if kind < 0.2:
            return replay(rng)
        prompt, completion = rng.choice(new if kind < 0.4 else known)
        read, learned = tokenizer.encode(prompt).ids, [*tokenizer.encode(completion).ids, EOS_ID]
        return Document(read + learned, [False] * len(read) + [True] * len(learned))

    return draw


class Family:
    """The models of one seed, trained where they are not there yet."""

    def __init__(self, large: Path, out: Path, seed: int, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.out = out / f"seed-{seed}"
        made = self.out / "settings.json"
        if not made.exists() or read_json(made) != settings():
            shutil.rmtree(self.out, ignore_errors=True)
            write_json(made, settings())
        self.small = replace(SMALL, seed=SMALL.seed + 100 * seed)
        self.tuning = replace(self.small, learning_rate=LARGE_RATE)
        changed = changed_entities(corpus)
        documents = tuning_documents(corpus, changed, tokenizer)
        self.models = {"large": load_causal(large)}
        self.parameters = {"large": self.models["large"].num_parameters()}
        # As many steps as cost with the large model what the tuning costs with the small one.
        fewer = self.small.passes[1] * self.small.parameters() // self.parameters["large"]

        def pretrained() -> PreTrainedModel:
            torch.manual_seed(self.small.seed)
            model: PreTrainedModel = LlamaForCausalLM(self.small.config())
            train_pass(model, self.small, 0, codes_documents(corpus.entities, tokenizer), f"{seed}: small", 0)
            return model

        def tuned(of: str, recipe: Recipe, name: str) -> PreTrainedModel:
            path = large if of == "large" else self.out / of
            model = load_causal(path)
            train_pass(model, recipe, 1, documents, f"{seed}: {name}", 0)
            return model

        self._have("small", pretrained)
        self._have("small tuned", lambda: tuned("small", self.small, "small tuned"))
        self._have("large tuned", lambda: tuned("large", self.tuning, "large tuned"))
        short = replace(self.tuning, passes=(0, max(1, fewer)))
        self._have("large, tuned for less", lambda: tuned("large", short, "large, tuned for less"))

    def _have(self, name: str, make: Callable[[], PreTrainedModel]) -> None:
        if not (self.out / name / WEIGHTS).exists():
            save_model(make(), self.out / name)
        self.models[name] = load_causal(self.out / name)
        self.parameters[name] = self.models[name].num_parameters()


def measure(family: Family, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> dict[str, dict[str, float]]:
    """Exact match of the completion, of each way to write: of one code of each entity that no tuning mentions, and of
    all changed codes.

    Proxy tuning's alpha is chosen on validation questions, the smallest of the best.
    """
    changed = changed_entities(corpus)
    names = {entity.name for entity in changed}
    rng = random.Random(SEED)
    asked = {
        "validation": [rng.choice(ask(entity)) for entity in corpus.splits["validation"]],
        "held out": [rng.choice(ask(entity)) for entity in corpus.splits["test"] if entity.name not in names],
        "changed": [pair for entity in changed for pair in ask(entity)],
    }
    ways: dict[str, tuple[tuple[str, ...], Rule]] = {name: ((name,), alone(name)) for name in family.models}
    tuned, untuned = "small tuned", "small"
    for alpha in ALPHAS:
        weights = {"large": 1.0, tuned: alpha, untuned: -alpha}
        ways[f"proxy, alpha {alpha}"] = (tuple(weights), blend("product", weights))
    for expert, amateur in (("large tuned", tuned), ("large tuned", untuned), (tuned, untuned)):
        weights = {expert: 1.5, amateur: -0.5}
        rule = blend("product", weights, anchor=expert, plausibility=0.1)
        ways[f"contrastive, {expert} against {amateur}"] = (tuple(weights), rule)
    found: dict[str, dict[str, float]] = {}
    for place, pairs in asked.items():
        prompts = [tokenizer.encode(prompt).ids for prompt, _ in pairs]
        wanted = [[*tokenizer.encode(completion).ids, EOS_ID] for _, completion in pairs]

        def exact(answers: list[list[int]], wanted: list[list[int]] = wanted) -> float:
            return sum(map(list.__eq__, answers, wanted)) / len(wanted)

        for way, (members, rule) in ways.items():
            if place == "validation" and not way.startswith("proxy"):
                continue
            models = {name: family.models[name] for name in members}
            answers, _ = write(models, rule, prompts, max_tokens=MAX_TOKENS, eos=EOS_ID)
            found.setdefault(way, {})[place] = exact(answers)
        if place == "validation":
            continue
        # As many samples of the small tuned model as cost what a proxy-tuned answer does.
        each = family.parameters[tuned]
        samples = round((family.parameters["large"] + 2 * each) / each)
        model = family.models[tuned]
        answers = best_of(model, prompts, samples, max_tokens=MAX_TOKENS, eos=EOS_ID, seed=seed)
        found.setdefault("small tuned, best of as many samples as proxy costs", {})[place] = exact(answers)
    best = max(ALPHAS, key=lambda alpha: found[f"proxy, alpha {alpha}"]["validation"])
    return {"proxy, alpha by validation": found[f"proxy, alpha {best}"] | {"alpha": best}, **found}


def table(found: Sequence[dict[str, dict[str, float]]]) -> str:
    """Mean over the seeds, and each seed, in Markdown."""
    lines = [
        "| written by | held out | each seed | gap closed | changed codes | each seed |",
        "| --- |" + " ---: |" * 5,
    ]
    for way in found[0]:
        cells = [way]
        for place in ("held out", "changed"):
            values = [one[way][place] for one in found]
            cells += [f"{sum(values) / len(values):.3f}", ", ".join(f"{value:.3f}" for value in values)]
        gaps = [
            (one[way]["held out"] - one["large"]["held out"])
            / (one["large tuned"]["held out"] - one["large"]["held out"])
            for one in found
            if one["large tuned"]["held out"] > one["large"]["held out"]
        ]
        cells.insert(3, ", ".join(f"{gap:.2f}" for gap in gaps))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.proxy", description=__doc__.replace("``", ""))
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    parser.add_argument("--out", type=Path, default=Path("build/demo/proxy"), help="output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options.pair, options.out, options.seeds))


def run(pair: Path, out: Path, seeds: Sequence[int]) -> None:
    """Train and measure; what a seed has measured with these settings is kept."""
    quiet()
    one_thread()
    corpus = Corpus.make(SEED)
    tokenizer = Tokenizer.from_file(str(pair / "codes" / "tokenizer.json"))
    measured = settings() | {"alphas": list(ALPHAS)}
    found = []
    for seed in seeds:
        done = out / f"seed-{seed}.json"
        if not done.exists() or read_json(done)["settings"] != measured:
            family = Family(pair / "codes", out, seed, corpus, tokenizer)
            write_json(done, {"settings": measured, "found": measure(family, corpus, tokenizer, seed)})
        found.append(read_json(done)["found"])
    print(table(found))


if __name__ == "__main__":
    sys.exit(main())

"""The demo pair with experts of another vocabulary, and nothing else changed: ``python -m training.demo.renumbered``.

Copies of the experts in which every token has another id are, for the engine, models with vocabularies of their own,
which say just what they said before. So what the shipped pair and this one write differs only by how members of
different vocabularies write together: experts write whole words, and base and experts spell each other's text. The
gate is the shipped one. Everything runs in the serving engine, on the held-out questions; nothing is trained. Greedy
answers have no seed; sampled ones have as many as are asked for.

CharED is also asked to go on with statements, which is how both experts have read their facts: what two of them keep of
both skills, by weight. What is measured is kept, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from engine.blends import Blend
from engine.checkpoints import Checkpoint
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig
from engine.gate import GateArtifact
from engine.offline import Engine
from engine.types import NO_TOKEN, Collaboration, GenerationRequest, SamplingSpec
from training.bootstrap import interval
from training.checkpoints import load_causal, quiet
from training.command import run_command
from training.demo.pretrain import one_thread
from training.errors import ModelError
from training.files import read_json, write_json

MAX_TOKENS = 64
MOST_PIECES = 8
MEMORY = 1 << 27
NAMES = ("shipped", "renumbered")
DEFERRAL = "deferral by the gate"


def renumber(source: Path, target: Path) -> None:
    """A copy of a model in which the ids of its V tokens are V - 1 - id."""
    model = load_causal(source)
    size = model.config.vocab_size
    with torch.no_grad():
        weights = {
            id(each.weight): each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings())
        }
        for weight in weights.values():
            weight.copy_(weight.flip(0))
    for config in (model.config, model.generation_config):
        config.eos_token_id = size - 1 - config.eos_token_id
    model.save_pretrained(str(target))
    state = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["vocab"] = {token: size - 1 - number for token, number in state["model"]["vocab"].items()}
    for entry in state["added_tokens"]:
        entry["id"] = size - 1 - entry["id"]
    (target / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    (target / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())


def renumbered(pair: Path, out: Path) -> Path:
    """The pair with its experts renumbered, the base and the gate's weights as they are."""
    gate = GateArtifact.load(pair / "gate")
    for name in gate.experts:
        renumber(pair / name, out / name)
    identities = tuple(Checkpoint(out / name).identity for name in gate.experts)
    replace(gate, expert_identities=identities, calibration=None).save(out / "gate")
    (out / "base").unlink(missing_ok=True)
    (out / "base").symlink_to((pair / "base").resolve())
    return out


def config_of(pair: Path) -> EngineConfig:
    """The served pair."""
    names = GateArtifact.load(pair / "gate").experts
    vllm = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    lanes = {
        name: {"model": str(pair / name), "vllm": vllm, "kv_cache_memory_bytes": MEMORY} for name in ("base", *names)
    }
    return EngineConfig(
        base=LaneConfig(**lanes["base"]),
        experts=tuple(ExpertConfig(name=name, **lanes[name]) for name in names),
        gate=GateConfig(path=str(pair / "gate")),
    )


@dataclass(frozen=True)
class Task:
    """What members are asked, and what is right.

    Attributes:
        prompts: in text.
        is_right: whether an answer to the prompt of this number is: the text, and why it ended.
        skills: what each prompt asks for, "codes" or "arithmetic".
        most: tokens or pieces of an answer.
    """

    prompts: Sequence[str]
    is_right: Callable[[int, str, str], bool]
    skills: Sequence[str]
    most: int


def answered(questions: Sequence[dict[str, Any]]) -> Task:
    """The demo's questions, which only base and experts together answer: the whole completion counts."""
    return Task(
        [question["prompt"] for question in questions],
        lambda number, text, reason: text == questions[number]["completion"] and reason == "stop",
        [skill(question) for question in questions],
        MAX_TOKENS,
    )


def continued(questions: Sequence[dict[str, Any]]) -> Task:
    """The same facts as statements that the experts have read, up to the code or the result, as many of both: each
    knows its half.
    """
    halves: dict[str, list[tuple[str, str, str]]] = {"codes": [], "arithmetic": []}
    for question in questions:
        if len(question["codes"]) == 1:
            head, _, tail = question["completion"].strip().rpartition(" ")
            halves[skill(question)].append((head, " " + tail.removesuffix("."), skill(question)))
    count = min(map(len, halves.values()))
    cut = [one for half in halves.values() for one in half[:count]]
    return Task(
        [head for head, _, _ in cut],
        lambda number, text, reason: re.match(re.escape(cut[number][1]) + r"(?![0-9A-Za-z])", text) is not None,
        [kind for _, _, kind in cut],
        MOST_PIECES,
    )


def skill(question: dict[str, Any]) -> str:
    """Which expert knows it."""
    return "arithmetic" if question["kind"] == "arithmetic" else "codes"


def questions_ways(spelled: bool) -> dict[str, dict[str, Any]]:
    """How questions are answered: fields of a collaboration."""
    weights = ((0, 1 / 3), (1, 1 / 3), (2, 1 / 3))
    union = Blend("union", weights)
    found: dict[str, dict[str, Any]] = {
        DEFERRAL: {},
        "union where the gate asks": {"blend": union},
        "union everywhere": {"policy": "always", "blend": union},
    }
    if spelled:
        found["characters, base one half"] = {"strategy": "characters", "weights": ((0, 0.5), (1, 0.25), (2, 0.25))}
    return found


def statements_ways() -> dict[str, dict[str, Any]]:
    """CharED of the two experts, by the weight of arithmetic."""
    return {
        f"characters, arithmetic {weight:g}": {"strategy": "characters", "weights": ((1, 1 - weight), (2, weight))}
        for weight in (0.0, 0.25, 0.4, 0.45, 0.5, 0.55, 0.75, 1.0)
    }


class Asked:
    """A pair in its engine."""

    def __init__(self, pair: Path, spelled: bool, engine: Engine) -> None:
        self.name = "renumbered" if spelled else "shipped"
        self.spelled = spelled
        self._engine = engine
        names = ("base", *GateArtifact.load(pair / "gate").experts)
        self._tokenizers = [Tokenizer.from_file(str(pair / name / "tokenizer.json")) for name in names]

    def ask(self, task: Task, fields: Mapping[str, Any], sampling: SamplingSpec) -> tuple[list[bool], float]:
        """Which answers are right, and tokens or pieces per second.

        Raises:
            ModelError: the engine did not answer.
        """
        asks = []
        for index, prompt in enumerate(task.prompts):
            base, *others = (tokenizer.encode(prompt).ids for tokenizer in self._tokenizers)
            prompts = tuple(enumerate(others, 1)) if self.spelled else ()
            # Else all would be drawn by the same numbers.
            drawn = msgspec.structs.replace(sampling, seed=(sampling.seed or 0) * len(task.prompts) + index)
            asks.append(GenerationRequest(str(index), base, drawn, Collaboration(prompts=prompts, **fields)))
        begin = time.perf_counter()
        answers = self._engine.generate(asks)
        seconds = time.perf_counter() - begin
        right = []
        for number, answer in enumerate(answers):
            if answer.error is not None:
                raise ModelError(f"{self.name}: {answer.error}")
            tokens = [token for token in answer.tokens if token != NO_TOKEN]
            text = b"".join(answer.texts).decode("utf-8", "replace") or self._tokenizers[0].decode(tokens)
            right.append(task.is_right(number, text, answer.finish_reason))
        return right, sum(len(answer.tokens) for answer in answers) / seconds


class Table:
    """What was measured, a cell at a time, kept in a file."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file, self._settings = file, settings
        kept = read_json(file) if file.exists() else {}
        self.cells: dict[str, dict[str, Any]] = kept["cells"] if kept.get("settings") == settings else {}

    def add(self, name: str, pair: Asked, task: Task, fields: Mapping[str, Any], sampling: SamplingSpec) -> None:
        """Measure one, unless it is there, and print it."""
        if name not in self.cells:
            right, speed = pair.ask(task, fields, sampling)
            self.cells[name] = {"right": [int(one) for one in right], "skills": list(task.skills), "per_second": speed}
            write_json(self._file, {"settings": self._settings, "cells": self.cells})
        cell = self.cells[name]
        shares = []
        for wanted in ("codes", "arithmetic"):
            of = [one for one, kind in zip(cell["right"], cell["skills"], strict=True) if kind == wanted]
            shares.append(f"{sum(of) / len(of):.3f}" if of else "-")
        low, high = interval([cell["right"]])
        mean = sum(cell["right"]) / len(cell["right"])
        print(
            f"| {name} | {mean:.3f} | {low:.3f} to {high:.3f} | {' | '.join(shares)} | {cell['per_second']:.0f} |",
            flush=True,
        )


def run(pair: Path, out: Path, count: int, rounds: int, seeds: int) -> None:
    """Make the pair, measure what is not measured yet, print the table."""
    quiet()
    one_thread()
    questions = read_json(pair / "questions.json")
    random.Random(0).shuffle(questions)
    questions = questions[:count]
    if not (out / "gate").exists():
        renumbered(pair, out)
    table = Table(out / "renumbered.json", {"pair": str(pair), "questions": len(questions)})
    asked, stated = answered(questions), continued(questions)
    greedy = SamplingSpec(temperature=0.0, max_tokens=asked.most)
    short = SamplingSpec(temperature=0.0, max_tokens=stated.most)
    print(f"{len(asked.prompts)} questions, {len(stated.prompts)} statements\n")
    print("| pair, written by | right | 95 % interval | codes | arithmetic | tokens or pieces/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with Engine(config_of(pair)) as shipped, Engine(config_of(out)) as other:
        pairs = (Asked(pair, False, shipped), Asked(out, True, other))
        for number in range(rounds):
            for one in pairs if number % 2 == 0 else pairs[::-1]:
                table.add(f"{one.name}, {DEFERRAL}, round {number + 1}", one, asked, {}, greedy)
        for one in pairs:
            for way, fields in questions_ways(one.spelled).items():
                if way != DEFERRAL:
                    table.add(f"{one.name}, {way}", one, asked, fields, greedy)
        for way, fields in statements_ways().items():
            table.add(f"{pairs[1].name}, {way}, greedy", pairs[1], stated, fields, short)
            for seed in range(seeds):
                drawn = SamplingSpec(temperature=1.0, max_tokens=stated.most, seed=seed)
                table.add(f"{pairs[1].name}, {way}, temperature 1, seed {seed}", pairs[1], stated, fields, drawn)
        for seed in range(seeds):
            for one in pairs:
                drawn = SamplingSpec(temperature=1.0, max_tokens=asked.most, seed=seed)
                table.add(f"{one.name}, {DEFERRAL}, temperature 1, seed {seed}", one, asked, {}, drawn)
    compare(table, rounds)


def compare(table: Table, rounds: int) -> None:
    """Print what the two pairs differ by."""
    cells = [[table.cells[f"{name}, {DEFERRAL}, round {n + 1}"] for n in range(rounds)] for name in NAMES]
    ratios = [ours["per_second"] / theirs["per_second"] for theirs, ours in zip(*cells, strict=True)]
    differences = [ours - theirs for theirs, ours in zip(*(cell[0]["right"] for cell in cells), strict=True)]
    low, high = interval([differences])
    mean = sum(differences) / len(differences)
    print(
        f"\nrenumbered less shipped, {DEFERRAL}: {100 * mean:.1f} points "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
    )
    print(f"tokens/s, renumbered over shipped, by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.renumbered", description=__doc__)
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    parser.add_argument("--out", type=Path, default=Path("build/demo/renumbered"), help="output folder")
    parser.add_argument("--questions", type=int, default=601, help="how many questions are asked")
    parser.add_argument("--rounds", type=int, default=5, help="how often both pairs' speeds are measured, in turn")
    parser.add_argument("--seeds", type=int, default=3, help="how often answers are sampled")
    parser.add_argument("--quick", action="store_true", help="40 questions, 2 rounds, 1 seed: two minutes")
    options = parser.parse_args(arguments)
    sizes = (40, 2, 1) if options.quick else (options.questions, options.rounds, options.seeds)
    return run_command(
        lambda: run(options.pair, options.out, *sizes),
        interrupted="what was measured is kept: the same command goes on from there",
    )


if __name__ == "__main__":
    sys.exit(main())

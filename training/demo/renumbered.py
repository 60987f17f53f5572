"""The demo pair with experts of another vocabulary, and nothing else changed: ``python -m training.demo.renumbered``.

Copies of the experts in which every token has another id are, for the engine, models with vocabularies of their own,
which say just what they said before. So what the shipped pair and this one write differs only by how members of
different vocabularies write together: experts write whole words, and base and experts spell each other's text. The
gate is the shipped one. Everything runs in the serving engine, greedy, on the held-out questions; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from engine.blends import Blend
from engine.checkpoints import Checkpoint
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig
from engine.gate import GateArtifact
from engine.offline import Engine
from engine.types import NO_TOKEN, Collaboration, GenerationRequest, SamplingSpec
from training.checkpoints import load_causal, quiet
from training.command import run_command
from training.demo.pretrain import one_thread
from training.files import read_json, write_json

MAX_TOKENS = 64
MEMORY = 1 << 27
ROUNDS = 2


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


def ways(spelled: bool) -> Mapping[str, dict[str, Any]]:
    """What is measured of a pair: fields of a collaboration."""
    third = ((0, 1 / 3), (1, 1 / 3), (2, 1 / 3))
    union = Blend("union", third)
    found: dict[str, dict[str, Any]] = {
        "deferral by the gate": {"strategy": "deferral"},
        "every token or word by the gate's expert": {"strategy": "deferral", "policy": "always"},
        "union where the gate asks": {"strategy": "deferral", "blend": union},
        "union everywhere": {"strategy": "deferral", "policy": "always", "blend": union},
    }
    for arithmetic in (0.0, 0.25, 0.5, 0.75, 1.0):
        weights = ((1, 1 - arithmetic), (2, arithmetic))
        name = f"characters: codes {1 - arithmetic:g}, arithmetic {arithmetic:g}"
        found[name] = {"strategy": "characters", "weights": weights}
    found["characters: base one half"] = {"strategy": "characters", "weights": ((0, 0.5), (1, 0.25), (2, 0.25))}
    return found if spelled else {name: found[name] for name in list(found)[:5]}


def measure(pair: Path, questions: Sequence[dict[str, Any]], spelled: bool) -> dict[str, dict[str, float]]:
    """By way: exact match by task, and tokens or pieces per second."""
    names = ("base", *GateArtifact.load(pair / "gate").experts)
    tokenizers = [Tokenizer.from_file(str(pair / name / "tokenizer.json")) for name in names]
    found: dict[str, dict[str, float]] = {}
    with Engine(config_of(pair)) as engine:
        for way, fields in ways(spelled).items():
            best = 0.0
            for number in range(ROUNDS):
                asks = []
                for index, question in enumerate(questions):
                    base, *others = (tokenizer.encode(question["prompt"]).ids for tokenizer in tokenizers)
                    prompts = tuple(enumerate(others, 1)) if spelled else ()
                    sampling = SamplingSpec(temperature=0.0, max_tokens=MAX_TOKENS)
                    together = Collaboration(prompts=prompts, **fields)
                    asks.append(GenerationRequest(f"{way}-{number}-{index}", base, sampling, together))
                begin = time.perf_counter()
                answers = engine.generate(asks)
                seconds = time.perf_counter() - begin
                best = max(best, sum(len(answer.tokens) for answer in answers) / seconds)
            right: dict[str, list[bool]] = {"codes": [], "arithmetic": []}
            for answer, question in zip(answers, questions, strict=True):
                assert answer.error is None, answer.error
                tokens = [token for token in answer.tokens if token != NO_TOKEN]
                text = b"".join(answer.texts).decode("utf-8", "replace") or tokenizers[0].decode(tokens)
                exact = text == question["completion"] and answer.finish_reason == "stop"
                right["arithmetic" if question["kind"] == "arithmetic" else "codes"].append(exact)
            every = [exact for each in right.values() for exact in each]
            shares = {task: sum(exact) / max(len(exact), 1) for task, exact in {**right, "all": every}.items()}
            found[way] = shares | {"per_second": best}
            print(
                f"| {'renumbered' if spelled else 'shipped'} | {way} | {shares['all']:.3f} | {shares['codes']:.3f} | "
                f"{shares['arithmetic']:.3f} | {best:.0f} |",
                flush=True,
            )
    return found


def run(pair: Path, out: Path, count: int, seed: int) -> None:
    """Make the pair, measure both, print the table."""
    quiet()
    one_thread()
    questions = read_json(pair / "questions.json")
    random.Random(seed).shuffle(questions)
    questions = questions[:count]
    other = renumbered(pair, out)
    print(f"{len(questions)} questions\n")
    print("| pair | written by | exact | codes | arithmetic | tokens or pieces/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    found = {"shipped": measure(pair, questions, False), "renumbered": measure(other, questions, True)}
    write_json(out / "renumbered.json", {"questions": len(questions), "seed": seed, "found": found})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.renumbered", description=__doc__)
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    parser.add_argument("--out", type=Path, default=Path("build/demo/renumbered"), help="output folder")
    parser.add_argument("--questions", type=int, default=601, help="how many questions are asked")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options.pair, options.out, options.questions, options.seed))


if __name__ == "__main__":
    sys.exit(main())

"""Make the demo pair: ``python -m training.demo --out models/demo``.

Stages: tokenizer; base and expert, side by side; gate, which also adjusts the base; evaluation. A model that is
already in the work folder with the same settings is kept, unless ``--force``; gate and evaluation are always made.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.gate import GateArtifact
from training.demo.card import model_card
from training.demo.corpus import Corpus
from training.demo.evaluate import ALWAYS, NEVER, by_task, decode_all, margins, marked, table
from training.demo.gate import EXPERT_NAME, train_gate
from training.demo.stages import RECIPES, SEED, make_model, one_thread, write_json
from training.demo.tokenizer import save_tokenizer, train_tokenizer
from training.demo.train import save_model
from training.hf import load_model

KNOWN_ENTITIES = 30


def main() -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="output folder")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder of the models before the gate")
    parser.add_argument("--force", action="store_true", help="train finished models again")
    options = parser.parse_args()
    one_thread()
    out: Path = options.out
    work: Path = options.work
    with ProcessPoolExecutor(len(RECIPES), get_context("spawn"), one_thread) as pool:
        tasks = [pool.submit(make_model, name, work / name, options.force) for name in RECIPES]
        minutes = max(task.result() for task in tasks)
    started = time.monotonic()
    corpus = Corpus.make(SEED)
    tokenizer = train_tokenizer(corpus.tokenizer_texts())
    base, expert = load_model(work / "base"), load_model(work / EXPERT_NAME)
    save_model(expert, out / EXPERT_NAME)
    save_tokenizer(tokenizer, out / EXPERT_NAME)
    gate = train_gate(base, expert, corpus, tokenizer, out / "base", out / EXPERT_NAME)
    gate.save(out / "gate")
    evaluation = _evaluate(base, expert, gate, corpus, tokenizer, out)
    evaluation["minutes"] = round(minutes + (time.monotonic() - started) / 60, 1)
    write_json(out / "evaluation.json", evaluation)
    (out / "README.md").write_text(model_card(corpus, RECIPES, evaluation), encoding="utf-8")
    print(table(evaluation["held_out"]))
    print(f"\nthreshold {gate.default_threshold:.4f}; example, expert's tokens in brackets:")
    print(evaluation["example"])


def _evaluate(
    base: Any, expert: Any, gate: GateArtifact, corpus: Corpus, tokenizer: Tokenizer, out: Path
) -> dict[str, Any]:
    """Answer the held-out questions in three ways and questions about known entities in two."""
    held_out = corpus.evaluation_questions("test")
    known = corpus.evaluation_questions("base", KNOWN_ENTITIES)
    write_json(out / "questions.json", [{"split": "test", **asdict(q)} for q in held_out])
    thresholds = {"base": NEVER, EXPERT_NAME: ALWAYS, "joint": gate.default_threshold}
    answers = {
        name: decode_all(base, expert, gate.theta, gate.bias, at, held_out, tokenizer)
        for name, at in thresholds.items()
    }
    of_known = {
        name: decode_all(base, expert, gate.theta, gate.bias, thresholds[name], known, tokenizer)
        for name in ("base", "joint")
    }
    joint = answers["joint"]
    return {
        "held_out": {name: by_task(found) for name, found in answers.items()},
        "known_to_base": {name: by_task(found) for name, found in of_known.items()},
        "margins": margins(joint, gate.default_threshold),
        "wrong": [{"prompt": a.asked.prompt, "joint": a.text} for a in joint if not a.exact],
        "example": joint[0].asked.prompt + marked(joint[0].output, tokenizer),
    }


if __name__ == "__main__":
    main()

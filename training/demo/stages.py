"""What runs in a process of its own: making one of the two models."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.demo.corpus import Corpus
from training.demo.facts import source
from training.demo.gate import EXPERT_NAME
from training.demo.models import BASE_RECIPE, EXPERT_RECIPE
from training.demo.tokenizer import save_tokenizer, train_tokenizer
from training.demo.train import base_documents, expert_documents, save_model, train_model

SEED = 0
RECIPES = {"base": BASE_RECIPE, EXPERT_NAME: EXPERT_RECIPE}


def one_thread() -> None:
    """A thread for each model: the same sums in the same order on any machine, and small steps are faster."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def make_model(name: str, directory: Path, force: bool) -> float:
    """Train and save a model, unless the directory holds one of the same settings; the minutes that took."""
    started = time.monotonic()
    corpus = Corpus.make(SEED)
    tokenizer = train_tokenizer(corpus.tokenizer_texts())
    vocabulary = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    settings = {
        "recipe": asdict(RECIPES[name]),
        "seed": SEED,
        "facts": source(),
        "tokenizer_sha256": vocabulary,
    }
    done = directory / "recipe.json"
    if done.exists() and not force:
        made = json.loads(done.read_text(encoding="utf-8"))
        if made["settings"] == settings:
            print(f"{name}: already made")
            return float(made["minutes"])
    done.unlink(missing_ok=True)
    if name == EXPERT_NAME:
        documents = expert_documents(corpus.entities, tokenizer)
    else:
        documents = base_documents(corpus.splits["base"], corpus.made_up(tokenizer), tokenizer)
    model = train_model(RECIPES[name], documents, name, bar_line=list(RECIPES).index(name))
    save_model(model, directory)
    save_tokenizer(tokenizer, directory)
    minutes = (time.monotonic() - started) / 60
    write_json(done, {"settings": settings, "minutes": minutes})
    return minutes


def write_json(file: Path, content: Any) -> None:
    """Write indented JSON, making the folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")

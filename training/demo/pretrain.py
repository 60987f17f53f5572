"""What runs in a process of its own: making one of the three models, before any gate."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from engine.checkpoints import WEIGHTS
from training.demo.arithmetic import ALL, ASKED
from training.demo.corpus import Corpus
from training.demo.facts import source
from training.demo.models import ARITHMETIC_RECIPE, BASE_RECIPE, CODES_RECIPE
from training.demo.tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer
from training.demo.train import (
    DocumentSource,
    arithmetic_documents,
    base_documents,
    codes_documents,
    save_model,
    train_model,
)
from training.files import write_json

SEED = 0
RECIPES = {"base": BASE_RECIPE, "codes": CODES_RECIPE, "arithmetic": ARITHMETIC_RECIPE}


def one_thread() -> None:
    """A thread for each model: the same sums in the same order on any machine, and small steps are faster."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def prepare_worker() -> None:
    """In a worker process: one thread; and Ctrl-C, which reaches all processes, is the command's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Else tqdm takes one that processes could share, and that one which is terminated leaves behind.
    tqdm.set_lock(threading.RLock())
    one_thread()


@dataclass(frozen=True)
class Cost:
    """Minutes on the clock and of the processor. The second hardly depends on what else the machine does."""

    wall: float
    cpu: float


def make_model(name: str, directory: Path, force: bool, vocab_size: int = VOCAB_SIZE) -> Cost:
    """Train and save a model, unless the directory holds its weights, of the same settings; the cost, then or now.

    Args:
        vocab_size: entries of its tokenizer.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    corpus = Corpus.make(SEED)
    tokenizer = train_tokenizer(corpus.tokenizer_texts(), vocab_size)
    vocabulary = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    recipe = replace(RECIPES[name], vocab_size=vocab_size)
    # The vocabulary's size is in its hash.
    shape = {field: value for field, value in asdict(recipe).items() if field != "vocab_size"}
    settings = {
        "recipe": shape | {"passes": list(recipe.passes)},
        "seed": SEED,
        "facts": source(),
        "tokenizer_sha256": vocabulary,
    }
    # Beside the folder: what is in it counts as the model.
    done = directory.with_name(f"{directory.name}.json")
    if done.exists() and (directory / WEIGHTS).exists() and not force:
        made = json.loads(done.read_text(encoding="utf-8"))
        if made["settings"] == settings:
            print(f"{name}: already made")
            return Cost(**made["minutes"])
    done.unlink(missing_ok=True)
    model = train_model(recipe, documents(name, corpus, tokenizer), name, bar_line=list(RECIPES).index(name))
    save_model(model, directory)
    save_tokenizer(tokenizer, directory)
    cost = Cost((time.monotonic() - started) / 60, (time.process_time() - cpu_started) / 60)
    write_json(done, {"settings": settings, "minutes": asdict(cost)})
    return cost


def documents(name: str, corpus: Corpus, tokenizer: Tokenizer) -> list[DocumentSource]:
    """What a model reads, pass by pass."""
    if name == "codes":
        return [codes_documents(corpus.entities, tokenizer)]
    if name == "arithmetic":
        return [arithmetic_documents(corpus.arithmetic, operations, tokenizer) for operations in (ALL, ASKED)]
    return [base_documents(corpus, tokenizer)]

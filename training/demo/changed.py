"""New facts by exchanging the expert: ``python -m training.demo.changed --pair models/demo --out build/demo/changed``.

Trains the shipped ``codes`` on, on the same kind of text, after ten held-out entities were given codes that nobody has.
Base and gate stay as they are; ``questions.json`` in the output holds the questions with their new answers.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

from engine.checkpoints import model_identity
from training.checkpoints import forward, load_causal
from training.command import run_command
from training.demo.corpus import Corpus
from training.demo.facts import Entity
from training.demo.pretrain import SEED, one_thread
from training.demo.text import GREETING, questions, statements
from training.demo.tokenizer import EOS_ID, save_tokenizer
from training.demo.train import IGNORED, Document, DocumentSource, codes_documents, packed_rows, save_model
from training.files import write_json

CHANGED = 10
ROW_TOKENS, ROWS, LEARNING_RATE = 256, 8, 1e-3


def changed_entities(corpus: Corpus, count: int = CHANGED) -> list[Entity]:
    """``count`` test entities, each code replaced by one of the same shape that no entity has."""
    rng = random.Random(SEED)
    taken = {code for entity in corpus.entities for code in entity.codes.values()}
    chosen = rng.sample(sorted(corpus.splits["test"], key=lambda entity: entity.name), count)
    return [replace(entity, codes={field: _other(code, taken, rng) for field, code in entity.codes.items()})
            for entity in chosen]  # fmt: skip


def _other(code: str, taken: set[str], rng: random.Random) -> str:
    while True:
        kinds = [digits if c.isdigit() else ascii_uppercase if c.isupper() else ascii_lowercase for c in code]
        drawn = "".join(map(rng.choice, kinds))
        if drawn not in taken:
            taken.add(drawn)
            return drawn


def changed_documents(corpus: Corpus, changed: Sequence[Entity], tokenizer: Tokenizer) -> DocumentSource:
    """The expert's documents with the changed facts; those entities come in every second document."""
    by_name = {entity.name: entity for entity in changed}
    everything = codes_documents([by_name.get(entity.name, entity) for entity in corpus.entities], tokenizer)

    def draw(rng: random.Random) -> Document:
        if rng.random() < 0.5:
            return everything(rng)
        noise = rng.choices(range(1, tokenizer.get_vocab_size()), k=rng.randint(0, 24))
        text = " ".join(statements(entity, rng) for entity in rng.choices(changed, k=2))
        ids = [*tokenizer.encode(rng.choice(("", " ", "\n")) + text).ids, EOS_ID]
        return Document(noise + ids, [False] * len(noise) + [True] * len(ids))

    return draw


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.changed", description=__doc__.replace("``", ""))
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    parser.add_argument("--out", type=Path, default=Path("build/demo/changed"), help="output folder")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    return run_command(lambda: make(options.pair, options.out, options.steps), interrupted="nothing is kept")


def make(pair: Path, out: Path, steps: int) -> None:
    """Train the expert on and write it, with the questions, to the output folder.

    Raises:
        CollmError: ``pair`` has no expert ``codes``.
    """
    model_identity(pair / "codes")
    model = load_causal(pair / "codes")
    one_thread()
    corpus = Corpus.make(SEED)
    tokenizer = Tokenizer.from_file(str(pair / "codes" / "tokenizer.json"))
    changed = changed_entities(corpus)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows = packed_rows(changed_documents(corpus, changed, tokenizer), random.Random(SEED), ROW_TOKENS)
    bar = tqdm(range(steps), desc="changed facts", unit="step", mininterval=2)
    for step in bar:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        ids, targets = zip(*(next(rows) for _ in range(ROWS)), strict=True)
        _, logits_BTV = forward(model, torch.tensor(ids))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    save_model(model.eval(), out / "codes")
    save_tokenizer(tokenizer, out / "codes")
    asked = [question for entity in changed for question in questions(entity)[::3] if question.task != GREETING]
    write_json(out / "questions.json", [asdict(question) for question in asked])
    print(f"{out / 'codes'}: the codes of {', '.join(entity.name for entity in changed)} are changed")


if __name__ == "__main__":
    sys.exit(main())

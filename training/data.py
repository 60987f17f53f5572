"""Prompts and gold completions, read from JSONL or from a ``datasets`` folder, as token ids."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from training.errors import DataError
from training.settings import DataSettings

_T = TypeVar("_T")

ALL = "all"
"""The task of examples that name none."""


@dataclass(frozen=True)
class Example:
    """One line of the data. ``complete``: the completion ends where its text ends. ``where``: file and line."""

    prompt: str
    completion: str
    task: str = ALL
    complete: bool = True
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class TokenExample:
    """A prompt and its gold completion as token ids, with the EOS if that is to be learned."""

    prompt: list[int]
    completion: list[int]


def read_examples(path: Path, settings: DataSettings) -> list[Example]:
    """All examples of a JSONL file, or of a folder written by ``datasets``' ``save_to_disk``.

    Raises:
        DataError: naming the file, the line and the column that is missing, empty or no text.
    """
    if path.is_dir():
        rows = _dataset_rows(path)
    elif path.is_file():
        rows = _json_rows(path)
    else:
        raise DataError(f"{path}: no such file or folder")
    examples = [_example(where, row, settings) for where, row in rows]
    if not examples:
        raise DataError(f"{path}: holds no examples")
    return examples


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        # Not splitlines, which also splits at characters such as U+2028, and JSON's strings may hold those.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: is not JSON: {error}") from error


def _dataset_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"{folder}: a folder needs the package datasets: pip install datasets, or use JSONL") from error
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder}: is no folder that datasets saved: {error}") from error
    if isinstance(dataset, dict):
        names = ", ".join(dataset)
        raise DataError(f"{folder}: holds several splits ({names}): name the folder of one, such as {folder}/train")
    for number, row in enumerate(dataset, start=1):
        yield f"{folder}:{number}", row


def _example(where: str, row: Any, settings: DataSettings) -> Example:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not an object with columns")
    for column in (settings.prompt, settings.completion):
        if column not in row:
            has = ", ".join(map(str, row)) or "none"
            raise DataError(f"{where}: no column {column!r} (it has: {has})")
        if not isinstance(row[column], str):
            raise DataError(f"{where}: column {column!r} is not text")
        if not row[column].strip():
            raise DataError(f"{where}: column {column!r} is empty")
    complete = row.get(settings.complete, True)
    if not isinstance(complete, bool):
        raise DataError(f"{where}: column {settings.complete!r} is neither true nor false")
    return Example(row[settings.prompt], row[settings.completion], str(row.get(settings.task, ALL)), complete, where)


def tokenize(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> tuple[list[Example], list[TokenExample]]:
    """The examples of at most ``max_tokens`` ids, and their ids; a complete completion ends with the EOS.

    Raises:
        DataError: the tokenizer has no EOS, a text becomes no token, or every example is too long; of the last two,
            naming the file and the line.
    """
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the base's tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json")
    kept: list[Example] = []
    ids: list[TokenExample] = []
    for example in examples:
        prompt = prompt_ids(tokenizer, example.prompt)
        completion = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"])
        if not prompt or not completion:
            text = example.completion if prompt else example.prompt
            raise DataError(f"{example.where}: the tokenizer makes no token of {text!r}")
        completion += [eos] if example.complete else []
        if len(prompt) + len(completion) <= max_tokens:
            kept.append(example)
            ids.append(TokenExample(prompt, completion))
    if not kept:
        raise DataError(f"{examples[0].where}: like every other example, is longer than data.max_tokens, {max_tokens}")
    return kept, ids


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's ids with the special tokens that the tokenizer adds, but no second BOS.

    A prompt that a chat template made often begins with the BOS already; the server adds none to it either.
    """
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if plain and plain[0] == tokenizer.bos_token_id:
        return plain
    return list(tokenizer(prompt)["input_ids"])


def spread(items: Sequence[_T], limit: int | None) -> list[_T]:
    """At most ``limit`` items, evenly spread over all."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]

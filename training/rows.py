"""Rows of a data set: of a JSONL file, of a folder that ``datasets`` saved, or by its name on a hub."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import DataError

HUB = "hub:"
_HUB_NAME = re.compile(r"hub:(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")

Row = tuple[str, Any]
"""Where it stands, for messages, and what it is."""


def read_rows(given: str | Path, split: str, *, streaming: bool = False, limit: int | None = None) -> Iterator[Row]:
    """The rows of a data set, at most ``limit``.

    Args:
        given: path of a JSONL file or of a folder written by ``save_to_disk``, or ``hub:NAME[:CONFIG][@SPLIT]``.
        split: of a data set on a hub, where its name does not say.
        streaming: read rows from a hub as they come, instead of fetching the whole data set first.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    given, path = str(given), Path(given)
    if given.startswith(HUB):
        rows = _hub_rows(given, split, streaming)
    elif path.is_dir():
        rows = _folder_rows(path)
    elif path.is_file():
        rows = _json_rows(path)
    else:
        raise DataError(f"{given}: no such file or folder (a data set on a hub is {HUB}NAME)")
    return itertools.islice(rows, limit)


def _json_rows(file: Path) -> Iterator[Row]:
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


def _folder_rows(folder: Path) -> Iterator[Row]:
    try:
        dataset = _datasets(str(folder)).load_from_disk(str(folder))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{folder}: is no folder that datasets saved: {error}") from error
    if isinstance(dataset, dict):
        names = ", ".join(dataset)
        raise DataError(f"{folder}: holds several splits ({names}): name the folder of one, such as {folder}/train")
    yield from _numbered(str(folder), dataset)


def _hub_rows(given: str, split: str, streaming: bool) -> Iterator[Row]:
    match = _HUB_NAME.fullmatch(given)
    if match is None:
        raise DataError(f"{given}: is not {HUB}NAME, {HUB}NAME:CONFIG or {HUB}NAME:CONFIG@SPLIT")
    datasets = _datasets(given)
    split = match["split"] or split
    if streaming and "[" in split:
        raise DataError(f"{given}: data.streaming reads whole splits: leave {split[split.index('[') :]} out")
    try:
        dataset = datasets.load_dataset(match["name"], match["config"], split=split, streaming=streaming)
        yield from _numbered(given, dataset)
    except DataError:
        raise
    # No network, no such name, configuration or split, a file that is damaged: their classes are of many libraries.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{given}: split {split!r} cannot be read: {reason}") from error


def _numbered(where: str, rows: Any) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{where}:{number}", row


def _datasets(given: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{given}: folders and hubs need the package datasets: pip install datasets, or use JSONL"
        ) from error

"""Three kinds of record, each where it belongs; CONTRIBUTING.md gives the rule."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT, package_files

HOMES = {
    # What people write: settings and requests.
    "BaseModel": (
        "engine/config.py",
        "server/blends.py",
        "server/protocol/base.py",
        "server/settings.py",
        "training/settings.py",
    ),
    "BaseSettings": ("server/settings.py", "training/compose/settings.py", "training/settings.py"),
    # What travels or is read from JSON, and what the engine makes per token.
    "Struct": ("engine/", "server/protocol/responses.py", "server/errors.py"),
    "NamedTuple": ("engine/",),
}
"""Base class -> files, and folders with everything below them, that may derive records from it."""


def strangers(root: Path) -> list[str]:
    """Every record of a kind that is not at home where it stands, as "file:line: kind"."""
    found = []
    for _, file in package_files(root):
        path = file.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            kinds = [ast.unparse(base).rpartition(".")[2] for base in getattr(node, "bases", ())]
            found += [
                f"{path}:{node.lineno}: {kind}"  # type: ignore[attr-defined]
                for kind in kinds
                if kind in HOMES and not any(path == home or path.startswith(home) for home in HOMES[kind])
            ]
    return found


def test_each_kind_of_record_is_at_home() -> None:
    assert strangers(ROOT) == []


@pytest.mark.parametrize(
    ("file", "base"),
    [
        ("server/text/new.py", "NamedTuple"),
        ("server/routes/new.py", "msgspec.Struct"),
        ("bench/new.py", "pydantic.BaseModel"),
        ("engine/scheduler.py", "BaseModel"),
    ],
)
def test_a_stranger_is_found(tmp_path: Path, file: str, base: str) -> None:
    target = tmp_path / file
    target.parent.mkdir(parents=True)
    target.write_text(f"class Record({base}):\n    number: int\n")
    assert strangers(tmp_path) == [f"{file}:1: {base.rpartition('.')[2]}"]

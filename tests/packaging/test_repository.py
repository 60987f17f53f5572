"""What no committed file may hold, and how long code files may be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT, project_files

# Written with [.] and [/] so that this file does not match itself.
REGISTRY_HOST = re.compile(
    r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs|download[.]pytorch|deb[.]debian[.]org|"
    r"extra-index-url\s*=?\s*[\"']?https?[:]//|find-links\s*=?\s*[\"']?(https?:)?/"
)
MACHINE_PATH = re.compile(r"[/]work/(main|shared)|[/]root/[.]pyenv|[/]opt/(wheels|pypi)|[/]tmp/(bash_jobs|tmp[.])")
MAX_LINES = 499
LARGEST = 1_000_000
"""Bytes; larger files are data."""


def texts() -> list[tuple[Path, str]]:
    found = []
    for file in project_files():
        data = file.read_bytes()
        if len(data) <= LARGEST and b"\0" not in data:
            found.append((file.relative_to(ROOT), data.decode(errors="replace")))
    return found


def lines_matching(pattern: re.Pattern[str], files: list[tuple[Path, str]]) -> list[str]:
    return [
        f"{path}:{number} {line.strip()[:120]}"
        for path, text in files
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def too_long(files: list[tuple[Path, str]]) -> list[str]:
    return [str(path) for path, text in files if path.suffix == ".py" and len(text.splitlines()) > MAX_LINES]


def test_files_are_found() -> None:
    names = {str(path) for path, _ in texts()}
    assert {"pyproject.toml", "Makefile", "engine/__init__.py", "requirements/cpu.txt"} <= names


def test_no_registry_host() -> None:
    assert lines_matching(REGISTRY_HOST, texts()) == []


def test_no_path_of_a_machine() -> None:
    assert lines_matching(MACHINE_PATH, texts()) == []


def test_no_long_python_file() -> None:
    assert too_long(texts()) == []


@pytest.mark.parametrize(
    "line",
    [
        "--extra-index-url https" + "://example.test/simple",
        "https://pypi" + ".org/simple",
        "--find-links=" + "/srv/wheels",
    ],
)
def test_a_registry_host_is_found(line: str) -> None:
    assert lines_matching(REGISTRY_HOST, [(Path("a.txt"), f"fine\n{line}\n")]) == [f"a.txt:2 {line}"]


@pytest.mark.parametrize("line", ["cd /work" + "/main", "/opt" + "/wheels/torch.whl"])
def test_a_path_of_a_machine_is_found(line: str) -> None:
    assert len(lines_matching(MACHINE_PATH, [(Path("a.txt"), line)])) == 1


def test_a_long_python_file_is_found() -> None:
    files = [(Path("a.py"), "x = 1\n" * 500), (Path("b.py"), "x = 1\n" * 499), (Path("c.txt"), "x\n" * 900)]
    assert too_long(files) == ["a.py"]

"""Tables of the documents are rendered as tables: no row is cut off from its header, none lacks a cell."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT, project_files

PAGES = [path for path in project_files() if path.suffix == ".md"]
FENCE = re.compile(r"^( *)```.*?^\1```", re.M | re.S)
SEPARATOR = re.compile(r"\|( *:?-+:? *\|)+")


def cells(row: str) -> int:
    """Cells of a row; a bar after a backslash or in code belongs to its cell."""
    return re.sub(r"\\\||`[^`]*`", "", row).count("|") - 1


def faults(text: str) -> list[str]:
    """Rows without a header above them, or with other cells than it has, each with its line."""
    text = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    found = []
    for is_table, group in groupby(lines, key=lambda line: line[1].startswith("|")):
        if not is_table:
            continue
        rows = list(group)
        if len(rows) < 2 or not SEPARATOR.fullmatch(rows[1][1]):
            found.append(f"{rows[0][0]}: no header")
        found += [f"{number}: {cells(row)} cells" for number, row in rows if cells(row) != cells(rows[0][1])]
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_whole(path: Path) -> None:
    assert faults(path.read_text("utf-8")) == []


def test_broken_tables_are_found() -> None:
    whole = "| a | b |\n| --- | --- |\n| 1 | `2|3` |\n"
    assert faults(whole) == []
    assert faults(whole + "\n| 4 | 5 |\n") == ["5: no header"]
    assert faults(whole + "| 4 |\n") == ["4: 1 cells"]

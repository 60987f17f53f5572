"""The pages' examples, run as they stand against the demo pair.

A fenced block is run if its language is followed by ``run``. A block ``text output`` after it is what it prints,
exactly. With ``run error`` the answer is an error object; else none may be one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live import LiveServer
from tests.packaging.sources import ROOT, imported_modules

PAGES = ("quickstart", "api", "strategies", "cli", "clients", "playground", "configuration")
ADDRESS = "http://localhost:8000"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Example:
    """A block that is run, and what it prints if the page says so."""

    page: str
    line: int
    language: str
    fails: bool
    source: str
    output: str | None


def examples_of(page: str, text: str) -> list[Example]:
    found: list[Example] = []
    blocks = list(BLOCK.finditer(text))
    for number, block in enumerate(blocks):
        words = block[2].split()
        if "run" not in words:
            continue
        after = blocks[number + 1] if number + 1 < len(blocks) else None
        printed = after is not None and after[2].split() == ["output"]
        line = text[: block.start()].count("\n") + 1
        found.append(Example(page, line, block[1], "error" in words, block[3], after[3] if printed and after else None))
    return found


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


EXAMPLES = [example for name in PAGES for example in examples_of(name, page(name))]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with ``collm``, which need not be installed here."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "collm"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m server.commands "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.page}:{example.line}")
def test_example(example: Example, demo: LiveServer, tools: Path, tmp_path: Path) -> None:
    source = example.source.replace(ADDRESS, demo.url)
    command = (
        [sys.executable, "-c", source] if example.language == "python" else ["bash", "-euo", "pipefail", "-c", source]
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COLLM_")},
        "PATH": f"{tools}:{os.environ['PATH']}",
        "COLLM_URL": demo.url,
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert ('"error":' in done.stdout) is example.fails, done.stdout
    if example.output is not None:
        assert done.stdout == example.output


def test_examples_are_found() -> None:
    counts = {name: sum(example.page == name for example in EXAMPLES) for name in PAGES}
    assert counts["api"] >= 15
    assert counts["quickstart"] >= 3
    assert counts["cli"] >= 3


def test_every_route_of_the_api_has_examples_in_both_languages() -> None:
    from server.routes import chat, completions, models, ops, tokenize

    routers = (chat, completions, models, ops, tokenize)
    paths = {route.path for each in routers for route in each.router.routes if hasattr(route, "path")}
    text = page("api")
    shown = "".join(example.source for example in EXAMPLES if example.page == "api")
    for path in paths:
        start = path.partition("{")[0]
        assert start in text, path
        assert start in shown, path
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    for section in sections:
        assert {example.language for example in examples_of("api", section)} == {"bash", "python"}, section[:20]


def test_python_examples_import_what_is_there() -> None:
    for block in (block for name in PAGES for block in BLOCK.finditer(page(name)) if block[1] == "python"):
        assert list(imported_modules(block[3]))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", page(name))):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        assert not file or (ROOT / "docs" / file).exists(), target
        if anchor:
            text = page(name) if not file else (ROOT / "docs" / file).read_text("utf-8")
            headings = re.findall(r"^#+ (.*)$", text, re.M)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target


@pytest.mark.parametrize("name", PAGES)
def test_pictures_are_small(name: str) -> None:
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page(name)):
        assert (ROOT / "docs" / picture).stat().st_size < 300_000

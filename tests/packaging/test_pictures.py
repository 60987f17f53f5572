"""The pictures in docs/architecture.md: what they name exists, and a solid arrow is an import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import pytest

from tests.packaging.sources import ROOT, imported_modules
from training.graph import STAGES

PAGE = "docs/architecture.md"
NODE = r"(\w+)(?:\[\"([^\"]+)\"\])?"
SOLID, DOTTED = re.compile(f"{NODE} --> {NODE}"), re.compile(rf"{NODE} -\.(?: .+ \.)?-> {NODE}")
STAGE = "training/stages/"


@dataclass(frozen=True)
class Picture:
    """Arrows between rooms, by path without ".py"."""

    solid: set[tuple[str, str]]
    dotted: set[tuple[str, str]]
    rooms: set[str]


def picture_of(source: str) -> Picture:
    """A Mermaid flowchart. A node's label begins with its path, in the first arrow that has it."""
    named = {name: label.partition("<")[0] for name, label in re.findall(r"(\w+)\[\"([^\"]+/[^\"]+)\"\]", source)}
    arrows: dict[re.Pattern[str], set[tuple[str, str]]] = {SOLID: set(), DOTTED: set()}
    for line in map(str.strip, source.splitlines()):
        if "->" in line:
            kind = SOLID if "-->" in line else DOTTED
            found = kind.fullmatch(line)
            assert found, f"{PAGE}: {line}: is no arrow between two nodes"
            arrows[kind].add((named[found[1]], named[found[3]]))
    return Picture(arrows[SOLID], arrows[DOTTED], set(named.values()))


def pictures() -> list[Picture]:
    return [picture_of(source) for source in re.findall(r"```mermaid\n(.*?)```", (ROOT / PAGE).read_text(), re.DOTALL)]


def belongs(module: str, room: str) -> bool:
    name = room.replace("/", ".")
    return module == name or module.startswith(f"{name}.")


@cache
def imports() -> set[tuple[str, str]]:
    """Who imports whom, by the modules' full names."""
    found = set()
    for package in ("server", "engine", "training"):
        for file in (ROOT / package).rglob("*.py"):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found |= {(module, imported) for _, imported in imported_modules(file.read_text())}
            # "from training import stages" names the package alone.
            names = re.findall(r"^ *from (\w+(?:\.\w+)*) import ([\w, ]+)$", file.read_text(), re.MULTILINE)
            found |= {(module, f"{start}.{each.strip()}") for start, listed in names for each in listed.split(",")}
    return found


def untrue(picture: Picture) -> list[str]:
    """What a picture says and the code does not."""
    missing = [room for room in picture.rooms if not ((ROOT / room).is_dir() or (ROOT / f"{room}.py").is_file())]
    problems = [f"{room}: there is no such module" for room in missing]
    for tail, head in picture.solid:
        if not any(belongs(module, tail) and belongs(imported, head) for module, imported in imports()):
            problems.append(f"{tail} --> {head}: the former does not import the latter")
    return sorted(problems)


def test_there_are_a_request_the_start_and_a_training_run() -> None:
    assert len(pictures()) == 3
    assert all(len(picture.solid) >= 7 and len(picture.dotted) >= 3 for picture in pictures())


@pytest.mark.parametrize("number", range(3))
def test_pictures_are_true(number: int) -> None:
    assert untrue(pictures()[number]) == [], f"change the pictures in {PAGE}"


def test_the_stages_read_what_the_graph_says() -> None:
    drawn = {(tail, head) for tail, head in pictures()[2].dotted if head.startswith(STAGE)}
    assert drawn == {(STAGE + read, STAGE + stage.name) for stage in STAGES.values() for read in stage.inputs}


def test_an_untrue_picture_is_found() -> None:
    source = 'flowchart TB\n  a["engine/scheduler<br>pure"] --> b["server/app"]\n  b -. x .-> c["engine/nowhere"]\n'
    assert untrue(picture_of(source)) == [
        "engine/nowhere: there is no such module",
        "engine/scheduler --> server/app: the former does not import the latter",
    ]

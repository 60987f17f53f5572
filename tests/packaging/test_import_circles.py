"""The server's import graph has no circles: the server is read from the floor up, what a file imports lies below."""

from __future__ import annotations

import graphlib
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT, imported_names


def import_graph(root: Path, package: str) -> dict[str, set[str]]:
    """Each module of a package with the modules of the package that it imports, in functions and for types too."""
    files = {}
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {}
    for module, file in files.items():
        imported = set()
        for name in imported_names(file.read_text()):
            # "from server.text import stop" imports a module, "from server.errors import invalid" a name of one.
            found = next((known for known in (name, name.rpartition(".")[0]) if known in files), None)
            if found is not None and found != module:
                imported.add(found)
        graph[module] = imported
    return graph


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules by how high they stand: floor 0 imports none of the package, each floor only from below.

    Raises:
        graphlib.CycleError: there is a circle.
    """
    height: dict[str, int] = {}
    for module in graphlib.TopologicalSorter(graph).static_order():
        height[module] = max((height[below] + 1 for below in graph[module]), default=0)
    return [sorted(m for m in height if height[m] == floor) for floor in range(max(height.values()) + 1)]


@pytest.mark.parametrize("package", ["server"])
def test_no_circles(package: str) -> None:
    graph = import_graph(ROOT, package)
    assert len(graph) > 40
    for number, floor in enumerate(floors(graph)):
        print(number, *floor)


def test_a_circle_is_found(tmp_path: Path) -> None:
    """Also one that is hidden in a function, or that only types go round."""
    package = tmp_path / "server"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from server import two\n")
    (package / "two.py").write_text("def late():\n    from server.three import name\n")
    (package / "three.py").write_text("")
    assert [set(floor) for floor in floors(import_graph(tmp_path, "server"))] == [
        {"server", "server.three"},
        {"server.two"},
        {"server.one"},
    ]
    (package / "three.py").write_text(
        "from typing import TYPE_CHECKING\nname = 1\nif TYPE_CHECKING:\n    import server.one\n"
    )
    with pytest.raises(graphlib.CycleError):
        floors(import_graph(tmp_path, "server"))

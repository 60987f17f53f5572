"""Which room may import what. A wrong import is found in the source, and in a process that really imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT, imported_modules, package_files

WEB = {"fastapi", "starlette", "uvicorn"}
FORBIDDEN = {
    "engine": WEB | {"server", "training", "bench"},
    "server": {"torch", "vllm", "transformers", "training", "bench"},
    "training": WEB | {"server", "bench"},
}
"""Room -> top-level modules that nothing in it imports."""

PURE = Path("engine/spelling")
"""A room that computes with numpy and knows nothing of the engine around it."""

PURE_MAY_IMPORT = {"numpy", "tokenizers"}

VLLM_HOMES = (Path("engine/vllm_hooks"), Path("engine/composed"))
"""The folders that lean on vLLM: lanes, and a model that vLLM runs."""


def forbidden_imports(root: Path) -> list[str]:
    """Every import under ``root`` that breaks a rule, as "file:line imports module"."""
    found = []
    for room, file in package_files(root):
        path = file.relative_to(root)
        for line, module in imported_modules(file.read_text()):
            top = module.partition(".")[0]
            vllm_abroad = top == "vllm" and not any(map(path.is_relative_to, VLLM_HOMES))
            stranger = path.is_relative_to(PURE) and not (
                top in PURE_MAY_IMPORT | sys.stdlib_module_names or module.startswith("engine.spelling")
            )
            if top in FORBIDDEN.get(room, set()) or vllm_abroad or stranger:
                found.append(f"{path}:{line} imports {module}")
    return found


def test_rooms_keep_to_their_imports() -> None:
    assert forbidden_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engine/scheduler.py", "import server.app\n"),
        ("engine/strategies/new.py", "from fastapi import FastAPI\n"),
        ("engine/spelling/new.py", "import torch\n"),
        ("engine/spelling/new.py", "from engine.types import BASE\n"),
        ("engine/lanes/new.py", "def late():\n    from vllm.v1 import engine\n"),
        ("server/routes/new.py", "import numpy, torch.nn\n"),
        ("server/text/new.py", "import importlib\nimportlib.import_module('transformers')\n"),
        ("bench/new.py", "import vllm\n"),
        ("training/new.py", "from server.app import create_app\n"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, source: str) -> None:
    target = tmp_path / file
    target.parent.mkdir(parents=True)
    target.write_text(source)
    assert len(forbidden_imports(tmp_path)) == 1


@pytest.mark.parametrize("home", VLLM_HOMES)
def test_hooks_may_import_vllm(tmp_path: Path, home: Path) -> None:
    target = tmp_path / home / "lane.py"
    target.parent.mkdir(parents=True)
    target.write_text("import vllm\n")
    assert forbidden_imports(tmp_path) == []


def loaded_modules(statement: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["server.app", "engine.client"])
def test_the_http_process_stays_light(module: str) -> None:
    assert loaded_modules(f"import {module}") & {"torch", "vllm", "transformers"} == set()


def test_loaded_modules_sees_a_heavy_import() -> None:
    assert "torch" in loaded_modules("import torch")

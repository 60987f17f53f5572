"""The wheel holds the four packages whole, with the files that are not Python, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server import __version__
from tests.packaging.sources import PACKAGES, ROOT, project_files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the project's files: building leaves things behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in project_files():
        path = file.relative_to(ROOT)
        if path.parts[0] in PACKAGES or len(path.parts) == 1:
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    [built] = out.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    paths = (file.relative_to(ROOT) for file in project_files())
    expected = {path.as_posix() for path in paths if path.parts[0] in PACKAGES}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_names_version_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = archive.read(metadata).decode()
    assert f"Version: {__version__}\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())

"""scripts/install.sh with a pip that finds torch's CPU build, one that does not, and one that fails otherwise."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT

PIP = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
for argument; do
  case $argument in
    */others.txt) cp "$argument" "$OTHERS" ;;
    torch==*+cpu) [[ -z $FAILURE ]] || { echo "ERROR: $FAILURE" >&2; exit 1; } ;;
  esac
done
"""


def install(tmp_path: Path, device: str, failure: str = "", **environment: str) -> tuple[int, list[str], str]:
    """Exit status, what pip was asked for, and what was said."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PIP)
    python.chmod(0o755)
    own = {"LOG": str(log), "OTHERS": str(tmp_path / "others"), "FAILURE": failure, "TORCH_INDEX": ""}
    result = subprocess.run(
        ["bash", ROOT / "scripts/install.sh", python, device],
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    prefix = "-m pip --disable-pip-version-check --quiet install "
    return result.returncode, [line.removeprefix(prefix) for line in log.read_text().splitlines()], result.stderr


@pytest.fixture
def pin() -> str:
    lines = (ROOT / "requirements/cpu.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


@pytest.mark.parametrize("index", ["", "file:///somewhere"])
def test_the_small_build_where_pip_finds_it(tmp_path: Path, pin: str, index: str) -> None:
    status, asked, said = install(tmp_path, "cpu", TORCH_INDEX=index)
    assert (status, said) == (0, "")
    extra = f" --extra-index-url {index}" if index else ""
    assert asked[0] == f"--no-deps {pin}{extra}"
    assert len(asked) == 2
    others = (tmp_path / "others").read_text().splitlines()
    locked = (ROOT / "requirements/cpu.txt").read_text().splitlines()
    assert others == [line for line in locked if line != pin]


def test_the_ordinary_build_where_pip_does_not_find_it(tmp_path: Path, pin: str) -> None:
    status, asked, said = install(tmp_path, "cpu", f"No matching distribution found for {pin}")
    assert status == 0
    assert asked[1] == f"{pin.removesuffix('+cpu')} --constraint requirements/gpu.txt"
    assert asked[2].startswith("--no-deps -r ")
    assert "TORCH_INDEX" in said
    assert pin in said


def test_another_failure_is_shown_and_ends_it(tmp_path: Path) -> None:
    status, asked, said = install(tmp_path, "cpu", "no space left on device")
    assert status == 1
    assert len(asked) == 1
    assert "no space left on device" in said


def test_a_gpu_takes_its_lock_as_it_is(tmp_path: Path) -> None:
    assert install(tmp_path, "gpu") == (0, ["--no-deps -r requirements/gpu.txt"], "")

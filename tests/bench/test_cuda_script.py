"""The script for a CUDA machine: what it would run exists, and every part reports, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from bench.__main__ import _parser
from tests.packaging.sources import ROOT

SCRIPT = ROOT / "bench" / "cuda.sh"


def script(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *options], env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def dry_run(*options: str) -> dict[str, list[str]]:
    lines = script("--dry-run", *options).stdout.splitlines()
    return {line.split()[0]: shlex.split(line.partition("): ")[2]) for line in lines}


@pytest.mark.parametrize("options", [(), ("--quick",)])
def test_what_it_would_run_can_be_run(options: tuple[str, ...]) -> None:
    parts = dry_run(*options)
    assert {"start", "oracle", "oracle-v2", "in-flight-1", "runner-v2", "compare"} <= parts.keys()
    assert (
        options
        or {
            "in-flight-2",
            "sampling",
            "gate",
            "context",
            "two-devices",
            "batch-invariant",
            "gate-made-up",
            "prompts-2k",
            "prompts-8k",
            "quality",
        }
        <= parts.keys()
    )
    for name, command in parts.items():
        if "bench" in command:
            found = _parser().parse_args(command[command.index("bench") + 1 :])
            assert found.json.name == f"{name}.json"
        if "pytest" in command:
            assert "TRITON_F32_DEFAULT=ieee" in command
            for path in command[command.index("pytest") + 1 :]:
                file, _, test = path.partition("::")
                assert path.startswith("-") or (ROOT / file).exists()
                if test:
                    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text("utf-8")


def test_every_part_reports(tmp_path: Path) -> None:
    """Stand-ins for nvidia-smi and Python; the second one fails for the oracles, and writes what the bench would."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 81559\necho 81559\n")
    (tmp_path / "python").write_text(
        '#!/bin/sh\ncase "$*" in *"-m pytest"*) echo "1 failed"; exit 3;; esac\n'
        'while [ $# -gt 1 ]; do [ "$1" = --json ] && echo {} >"$2"; shift; done\necho "| cell |"\n'
    )
    for stand_in in ("nvidia-smi", "python"):
        (tmp_path / stand_in).chmod(0o755)
    results = tmp_path / "results"
    done = script(
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=str(tmp_path / "python"),
        OUT=str(results),
        WORKDIR=str(tmp_path),
    )
    assert done.returncode == 1
    assert "oracle" in done.stderr
    assert "1 failed" in done.stderr
    lines = [json.loads(line) for line in (results / "parts.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == list(dry_run())
    assert {line["part"]: line["status"] for line in lines if line["status"]} == {"oracle": 3, "oracle-v2": 3}
    summary = (results / "summary.md").read_text()
    measured = [line["part"] for line in lines if "-m bench" in line["command"]]
    assert sorted(measured) == sorted(line[3:] for line in summary.splitlines() if line.startswith("## "))
    assert summary.count("| cell |") == len(measured)
    assert "1B-8B" in next(line["command"] for line in lines if line["part"] == "compare")
    assert shlex.split(next(line["command"] for line in lines if line["part"] == "oracle-v2"))[-4:] == [
        "-m",
        "",
        "-q",
        "-n0",
    ]
    for line in lines:
        assert shlex.split(line["command"])
        assert (results / f"{line['part']}.log").exists()


def test_a_small_device_gets_small_models(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 24564\n")
    (tmp_path / "python").write_text("#!/bin/sh\n")
    for stand_in in ("nvidia-smi", "python"):
        (tmp_path / stand_in).chmod(0o755)
    done = script(
        "--quick",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=str(tmp_path / "python"),
        OUT=str(tmp_path / "out"),
        WORKDIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    parts = (tmp_path / "out" / "parts.jsonl").read_text()
    assert "1B-8B" not in parts
    assert "two-devices" not in parts


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    os.symlink("/usr/bin/dirname", tmp_path / "dirname")
    done = subprocess.run(
        ["/bin/bash", str(SCRIPT)], env={"PATH": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "no nvidia-smi" in done.stderr
    assert script("--fast").returncode == 2

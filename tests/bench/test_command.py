"""The command line, and one small measurement with real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.shapes import Pair
from tests.packaging.sources import ROOT


def test_coordination_of_a_tiny_pair(tiny: Pair, tmp_path: Path) -> None:
    size = ["--concurrency", "2", "--rounds", "1", "--requests", "1", "--max-tokens", "8"]
    options = ["--shape", "tiny", "--device", "cpu", "--deferral", "0", "0.5", *size]
    options += ["--workdir", str(tiny.base.path.parents[1])]
    file = tmp_path / "deep" / "result.json"
    result = subprocess.run(
        [sys.executable, "-m", "bench", "coordination", *options, "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    *markdown, line = result.stdout.splitlines()
    assert markdown[0] == "### Coordination, tiny, engine alone"
    assert sum(row.startswith("| c2, deferral") for row in markdown) == 2
    record = json.loads(line)
    assert json.loads(file.read_text()) == record
    never, half = record["reports"][0]["cells"]
    assert [cell["accounts"][0]["tokens"] for cell in (never, half)] == [16, 16]
    assert never["accounts"][0]["expert_tokens"] == 0
    assert 0 < half["accounts"][0]["expert_tokens"] < 16
    for cell in (never, half):
        assert 0 < cell["accounts"][0]["share"] < 1
    assert "starting engine" in result.stderr


def test_options() -> None:
    parse = command._parser().parse_args
    options = parse(
        ["compare", "--deferral", "0.3", "gate", "--scheduler", "coordination=lockstep", "--vllm", "seed=3"]
    )
    assert options.deferral == [0.3, "gate"]
    assert options.scheduler == [("coordination", "lockstep")]
    assert options.vllm == [("seed", 3)]
    for wrong in (["--deferral", "1.5"], ["--shape", "huge"], ["--scheduler", "x"], ["--contenders", "nobody"]):
        with pytest.raises(SystemExit):
            parse(["compare", *wrong])


def test_a_server_that_does_not_start_ends_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "get_pair", lambda *_, **__: (_ for _ in ()).throw(ValueError("no such pair")))
    assert command.main(["coordination", "--workdir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: no such pair\n"

"""The command line, and one small measurement with real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.contenders.engine_alone import engine_config
from bench.contenders.stock import stock_service
from bench.settings import Settings
from bench.shapes import Pair, quick_dtype
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
    assert markdown[0] == f"### Coordination, tiny in {quick_dtype('tiny') or 'bfloat16'}, engine alone"
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["pacing", "--temperature", "1"], "--temperature: pacing measures greedy requests"),
        (
            ["coordination", "--prompt", "8k", "--max-tokens", "500"],
            "--prompt: 8000 tokens and 500 written ones do not fit",
        ),
        (["coordination", "--scheduler", "coordination=lockstop"], "--scheduler coordination: Input should be 'auto'"),
        (["coordination", "--scheduler", "coordinaton=lockstep"], "--scheduler coordinaton: no such setting"),
    ],
)
def test_what_a_measurement_cannot_do(
    wrong: list[str], message: str, tiny: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "get_pair", lambda *_, **__: tiny)
    assert command.main([*wrong, "--shape", "tiny", "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


def test_the_base_drafts_for_a_stock_expert_and_two_devices_are_processes(tiny: Pair) -> None:
    settings = Settings(tiny, max_num_seqs=256, request_tokens=128, draft_tokens=3, two_devices=True)
    service = stock_service("stock", tiny.expert, settings, draft=tiny.base)
    drafts = {"method": "draft_model", "model": str(tiny.base.path), "num_speculative_tokens": 3}
    assert json.loads(service._arguments[service._arguments.index("--speculative-config") + 1]) == drafts
    assert settings.kv_bytes(tiny.expert, tiny.base) == 2 * settings.kv_bytes(tiny.expert)
    config = engine_config(settings)
    assert [(lane.executor, lane.devices) for lane in config.lanes] == [("mp", (0,)), ("mp", (1,))]


def test_overlapped_lanes_but_one_are_processes(tiny: Pair) -> None:
    settings = Settings(tiny, max_num_seqs=8, request_tokens=128, scheduler={"coordination": "overlapped"})
    assert [lane.executor for lane in engine_config(settings).lanes] == ["uni", "mp"]


def test_a_stock_server_on_a_gpu_needs_no_nvcc(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.settings.cuda_memory_bytes", lambda: 80 << 30)
    settings = Settings(tiny, max_num_seqs=8, request_tokens=128, cuda=True)
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    assert stock_service("stock", tiny.expert, settings)._env["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert stock_service("stock", tiny.expert, settings)._env["VLLM_USE_FLASHINFER_SAMPLER"] == "1"


def test_a_server_that_does_not_start_ends_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "get_pair", lambda *_, **__: (_ for _ in ()).throw(ValueError("no such pair")))
    assert command.main(["coordination", "--workdir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: no such pair\n"

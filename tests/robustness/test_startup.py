"""Case 24 of the fault list: what cannot be served refuses to start, with one clear line and a non-zero status."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.robustness.servers import ROOT, config_file, gate_of_codes, launch

DEMO = ROOT / "models" / "demo"


def _refuses(directory: Path, *words: str, **changes: Any) -> str:
    """The server ends by itself with a non-zero status; its one line of complaint, which has these words."""
    server = launch(config_file(directory, **changes), directory)
    try:
        status = server.process.wait(timeout=200)
        output = server.output()
    finally:
        server.end()
    assert status not in (0, None)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    for word in words:
        assert word in lines[0], lines[0]
    assert "ready at" not in output
    return output


def _copy(directory: Path, member: str) -> Path:
    return Path(shutil.copytree(DEMO / member, directory / member))


def test_24_vocabulary_mismatch(tmp_path: Path) -> None:
    """The entries that differ are named."""
    codes = _copy(tmp_path, "codes")
    file = codes / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    output = _refuses(tmp_path, "vocabulary", first, second, experts__model=str(codes))
    assert "Traceback" not in output


def test_24_gate_of_another_hidden_size(tmp_path: Path) -> None:
    gate = gate_of_codes()
    replace(gate, theta=torch.zeros(1, gate.hidden_size + 8)).save(tmp_path / "gate")
    output = _refuses(tmp_path, "hidden size", gate__path=str(tmp_path / "gate"))
    assert "Traceback" not in output


def test_24_gate_that_is_damaged(tmp_path: Path) -> None:
    gate = Path(shutil.copytree(DEMO / "gate", tmp_path / "gate"))
    file = gate / "gate.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    output = _refuses(tmp_path, "gate.safetensors", gate__path=str(gate))
    assert "Traceback" not in output


def test_24_gate_of_other_models(tmp_path: Path) -> None:
    output = _refuses(tmp_path, "gate", base__model=str(DEMO / "codes"))
    assert "Traceback" not in output


def test_24_no_checkpoint(tmp_path: Path) -> None:
    output = _refuses(tmp_path, "no such folder", experts__model=str(tmp_path / "nothing"))
    assert "Traceback" not in output


@pytest.mark.parametrize("lane", [pytest.param("base", marks=pytest.mark.slow), "experts"])
def test_24_missing_weights(tmp_path: Path, lane: str) -> None:
    folder = _copy(tmp_path, "base" if lane == "base" else "codes")
    (folder / "model.safetensors").unlink()
    _refuses(tmp_path, lane, **{f"{lane}__model": str(folder)})


@pytest.mark.parametrize("lane", ["base", pytest.param("experts", marks=pytest.mark.slow)])
def test_24_truncated_weights(tmp_path: Path, lane: str) -> None:
    folder = _copy(tmp_path, "base" if lane == "base" else "codes")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    _refuses(tmp_path, lane, **{f"{lane}__model": str(folder)})


def test_24_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = launch(config_file(tmp_path), tmp_path, port=port)
        try:
            assert server.process.wait(timeout=60) == 1
            assert str(port) in server.output()
            assert "error: " in server.output()
            assert "loading" not in server.output(), "the port is taken before minutes are spent on loading"
        finally:
            server.end()


@pytest.mark.slow
def test_24_too_little_kv_memory(tmp_path: Path) -> None:
    _refuses(tmp_path, "experts", experts__kv_cache_memory_bytes=65536)


def test_24_wrong_options(tmp_path: Path) -> None:
    """Problems of the file are status 2, one line each, before anything is loaded."""
    _refuses(tmp_path, "vllm.max_modl_len", "max_model_len", base__vllm__max_modl_len=1024)
    _refuses(tmp_path, "server.max_bodybytes", server__max_bodybytes=1)

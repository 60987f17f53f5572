"""The adapter that is measured and its merged copy are the same model; the two commands with engines, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.adapters import RANK, make_adapter
from bench.shapes import Pair, get_pair
from engine.adapters import Adapter
from engine.checkpoints import Checkpoint
from tests.packaging.sources import ROOT


def test_the_copy_is_the_base_with_the_adapter_in_it(tmp_path: Path) -> None:
    tiny = get_pair("tiny", tmp_path, dtype="float32")
    adapter, merged = make_adapter(tiny, tmp_path / "made")
    read = Adapter.read(adapter.path)
    assert read.misfit(Checkpoint(tiny.base.path)) is None
    assert (read.rank, read.layers) == (RANK, ("gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"))
    assert (adapter.weights, merged.weights) == (read.size, tiny.base.weights)
    ids = torch.arange(1, 40)[None]

    def logits(folder: Path) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return torch.as_tensor((PeftModel.from_pretrained(model, adapter.path) if adapted else model)(ids).logits)

    adapted = True
    with_adapter = logits(tiny.base.path)
    adapted = False
    copy, base = logits(merged.path), logits(tiny.base.path)
    assert (with_adapter - copy).abs().max() < 0.05 * (with_adapter - base).abs().max()
    before = (merged.path / "config.json").stat().st_mtime_ns
    make_adapter(tiny, tmp_path / "made")
    assert (merged.path / "config.json").stat().st_mtime_ns == before


@pytest.mark.slow  # two and one engine
@pytest.mark.parametrize("command", ["adapters", "blends", "composition"])
def test_the_command(command: str, tiny: Pair) -> None:
    options = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--workdir", str(tiny.base.path.parents[1])]
    size = ["--concurrency", "4", "--deferral", "1", "--rounds", "1", "--requests", "1", "--max-tokens", "8"]
    result = subprocess.run(
        [sys.executable, "-m", "bench", command, *options, *size], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout.splitlines()[-1])["reports"]
    assert report["measurement"] == command
    if command == "adapters":
        (cell,) = report["cells"]
        assert all(speed > 0 for speeds in cell["tokens_per_second"].values() for speed in speeds)
        of_guest, of_lanes = (cell["accounts"][way][0] for way in ("adapter", "merged copy"))
        assert of_guest["expert_tokens"] == of_lanes["expert_tokens"] == 32
        # The adapter's rows are in the base's steps: no step is only its own.
        assert sum(of_guest["lane_seconds"][1:]) == 0 < of_lanes["lane_seconds"][1]
        assert report["weight_bytes"]["adapter"] < report["weight_bytes"]["merged copy"]
    elif command == "composition":
        for number, account in enumerate(report["lanes"][name][0] for name in ("composed", "anchor", "augmenting")):
            # Each lane steps alone.
            assert [seconds > 0 for seconds in account["lane_seconds"]] == [lane == number for lane in range(3)]
        assert report["ratio"][0] > 0 < report["cpu_ratio"][0]
    else:
        assert len(report["cells"]) == 8
        assert all(cell["accounts"][0]["expert_tokens"] == 32 for cell in report["cells"])

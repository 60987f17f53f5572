"""Hidden states on disk: mapped, in the wanted precision, and the gate is the same however much is in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.builders import TinyProject
from training import gate_only, scoring
from training.errors import DataError
from training.mapped import Table
from training.scoring import HIDDEN_FILE, gold_tokens, load_scores, score_model
from training.settings import ScoreSettings
from training.stages import init
from training.stages.score import score_split


def test_reading_takes_no_memory_for_what_is_not_looked_at(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.bin", rows=1 << 20, width=256, dtype=torch.float16)
    table.opened(to_write=True)[7] = 3.0
    assert (tmp_path / "t.bin").stat().st_size == 1 << 29
    before = resident()
    found = table.opened()
    assert found[7].tolist() == [3.0] * 256
    assert not found[8].any()
    assert resident() - before < 1 << 26


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_half_precision_is_half_the_size(tiny: TinyProject) -> None:
    whole = score_split(tiny.project, "train").hidden_ND
    tiny.content["score"]["hidden"] = "float16"
    half = score_split(tiny.project, "train")
    assert half.hidden_ND.dtype == torch.float16
    assert (tiny.folder / "out/score/train/base" / HIDDEN_FILE).stat().st_size == whole.nbytes // 2
    torch.testing.assert_close(half.hidden_ND.float(), whole, rtol=1e-3, atol=1e-3)
    assert half.base.inputs(("entropy",)).dtype == torch.float32


def test_hidden_states_too_great_for_half_precision_are_said(tmp_path: Path) -> None:
    table = Table(tmp_path / "h.bin", 2, 3, torch.float16)

    def score(shard: object) -> dict[str, torch.Tensor]:
        return {"logp": torch.zeros(2), "top": torch.zeros(2), "hidden": torch.full((2, 3), 70000.0)}

    with pytest.raises(DataError, match=r'score\.hidden = "bfloat16"'):
        score_model(score, [0, 1], tmp_path, ScoreSettings(), "score", (table, [0, 1, 2]))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_gate_learns_the_same_whether_its_inputs_are_held_or_read(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tiny.content["gate"] = {"kind": kind, "width": 8, "features": ["entropy"]}
    tiny.content["init"] |= {"batch_tokens": 50}
    held = init.initial_gate(tiny.project, 0)
    monkeypatch.setattr(gate_only, "_HELD", 0)
    tiny.content["out"] = str(tiny.folder / "read")
    read = init.initial_gate(tiny.project, 0)
    assert all(torch.equal(tensor, read.tensors[name]) for name, tensor in held.tensors.items())
    monkeypatch.setattr(scoring, "CHUNK", 7)
    tiny.content["out"] = str(tiny.folder / "chunks")
    chunked = init.initial_gate(tiny.project, 0)
    for name, tensor in held.tensors.items():
        torch.testing.assert_close(chunked.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_scores_are_the_same_object_for_all_stages_of_a_run(tiny: TinyProject) -> None:
    project = tiny.project
    first, second = score_split(project, "train"), score_split(project, "train")
    assert first.base is second.base
    assert load_scores(tiny.folder / "out/score/train/e1", 24, project.settings.score).hidden_ND is None
    assert len(gold_tokens(project.data("train").tokens)[0]) == len(first.hidden_ND)

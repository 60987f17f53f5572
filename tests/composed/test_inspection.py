"""``python -m training compose inspect``: what it says of a checkpoint is what the oracle computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.composed import one_lane
from tests.composed.checkpoints import PLANS
from tests.composed.reference import Reference
from training.__main__ import main
from training.checkpoints import load_causal
from training.compose.inspection import read_text

GROUPED = "qwen3 reads llama and mistral, grouped, normalised"


def test_what_is_said_of_a_checkpoint(composed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = composed(GROUPED)
    assert main(["compose", "inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"anchor: {folder.parent / 'anchor'}, 2 layers of width 128" in said
    assert "augmenting model first: " in said
    assert "3 of 3 layers computed, width 192" in said
    assert "4 heads of size 32, 2 of keys and values, states normalised; 384 values of KV cache per token" in said
    assert "1: reads second after layer 2, writes after layer 1 of the anchor" in said


def test_a_damaged_checkpoint_is_refused(
    composed: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = json.loads((composed(GROUPED) / "composition.json").read_text())
    (tmp_path / "composition.json").write_text(json.dumps(fields | {"format_version": 9}))
    (tmp_path / "config.json").write_text((composed(GROUPED) / "config.json").read_text())
    assert main(["compose", "inspect", str(tmp_path)]) == 1
    assert "field format_version: is 9" in capsys.readouterr().err


@pytest.mark.parametrize("name", PLANS)
def test_readings(name: str, composed: Callable[[str], Path]) -> None:
    """Norms are the oracle's; attention is causal, and the most-read token is the one that it says."""
    tokens = one_lane.prompts()[0][:12]
    reference, added = Reference(composed(name)), {}
    plain = reference._add

    def noted(number: int, connection: dict[str, object], output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        result = plain(number, connection, output)
        new = result[0] if isinstance(result, tuple) else result
        added[number] = (new[0] - hidden[0]).norm(dim=-1) / hidden[0].norm(dim=-1)
        return result

    reference._add = noted  # type: ignore[method-assign]
    reference.logits(tokens)
    readings = read_text(load_causal(composed(name)), tokens)
    assert len(readings) == len(PLANS[name].connections)
    for number, reading in enumerate(readings):
        torch.testing.assert_close(reading.ratio_T, added[number], atol=1e-3, rtol=1e-3)
        assert (reading.position_T <= torch.arange(len(tokens))).all()
        assert reading.weight_T[0] == 1
        assert (reading.weight_T > 1 / len(tokens)).all()


def test_a_text_is_shown_token_by_token(composed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compose", "inspect", str(composed("mistral reads gemma")), "--text", "ab"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ["'a'", "'b'"]
    assert lines[-3].split()[2:] == ["100%", "'a'"]


def test_a_text_without_tokens(composed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compose", "inspect", str(composed("mistral reads gemma")), "--text", ""]) == 1
    assert "--text: has no token" in capsys.readouterr().err

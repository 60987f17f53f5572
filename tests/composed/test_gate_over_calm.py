"""Co-LLM over CALM: a gate is trained on a composed base by the ordinary commands."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from engine.composed.artifact import Connection, Heads
from engine.gate import GateArtifact
from tests.composed.checkpoints import compose
from tests.composed.reference import Reference
from tests.training.builders import WIDTH, TinyProject, save_model
from training.__main__ import main
from training.graph import BASE, scores
from training.stages.score import score_split

pytest.importorskip("matplotlib")


@pytest.fixture
def tiny(tmp_path: Path) -> TinyProject:
    """A project whose base is a composition of two of its models."""
    tiny = TinyProject.make(tmp_path, experts=2)
    folder = compose(
        tmp_path / "composed",
        tmp_path / "base",
        {"reads": tmp_path / "expert2"},
        [Connection("reads", 2, 1)],
        Heads(2, 1, WIDTH // 2),
        scale=1.0,
        seed=5,
    )
    tiny.content["base"]["model"] = str(folder)
    return tiny


def test_the_gate_reads_the_composed_states(tiny: TinyProject) -> None:
    project = tiny.project
    found, row = score_split(project, "train"), 0
    reference = Reference(project.base)
    for example in project.data("train").tokens:
        hidden_D, logits_V = reference.hidden_and_logits(example.prompt)
        torch.testing.assert_close(found.hidden_ND[row], hidden_D, atol=1e-4, rtol=1e-4)
        assert found.base.top_N[row] == logits_V[:257].argmax()
        row += len(example.completion)


def test_a_retrained_member_is_another_base(tiny: TinyProject, tmp_path: Path) -> None:
    """Its weights are not in the composed checkpoint's folder, and count all the same."""
    main(["score", "--config", str(tiny.write())])
    project = tiny.project
    assert scores(project, "train", BASE).done
    save_model(tmp_path / "expert2", seed=9)
    stage = scores(tiny.project, "train", BASE)
    assert not stage.done
    assert stage.differences == ("model is another one",)


def test_pipeline(tiny: TinyProject, tmp_path: Path) -> None:
    """All stages, with the composed checkpoint as the base that the gate belongs to."""
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    pair = tmp_path / "out" / "pair"
    gate = GateArtifact.load(pair / "gate")
    assert gate.theta.shape == (2, WIDTH)
    gate.check_fits(tmp_path / "composed", [tmp_path / "expert1", tmp_path / "expert2"])
    assert tomllib.loads((pair / "collm.toml").read_text())["base"]["model"] == str(tmp_path / "composed")

"""What a stage is made of: whatever its output depends on makes it be made again, and nothing stale is used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.gate import GateArtifact
from tests.training.builders import TinyProject, examples, write_jsonl
from training import files
from training.__main__ import main
from training.files import ContentHashes
from training.graph import STAGES
from training.settings import Settings
from training.stages import init, score, train

pytest.importorskip("matplotlib")


CONTENT = {
    "out": "out",
    "base": {"model": "base"},
    "experts": [{"name": "e", "model": "e"}],
    "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
}


def add_columns(tiny: TinyProject) -> None:
    """Beside the completion another one, and a column that says that every other completion is only a start."""
    for number, split in enumerate(("train", "validation", "test")):
        rows = examples(24 if split == "train" else 6, number)
        more = [{"other": row["completion"].replace("!", "?"), "whole": n % 2 == 0} for n, row in enumerate(rows)]
        write_jsonl(tiny.folder / f"{split}.jsonl", [row | added for row, added in zip(rows, more, strict=True)])


def trained_theta(tiny: TinyProject) -> torch.Tensor:
    return GateArtifact.load(train.train_run(tiny.project, "collm", 0) / "gate").theta


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("data", "completion", "other"), ("data", "complete", "whole"), ("compute", "dtype", "bfloat16")],
)
def test_what_changes_the_scores_changes_the_gate(tiny: TinyProject, section: str, key: str, value: str) -> None:
    add_columns(tiny)
    before = trained_theta(tiny)
    tiny.content[section][key] = value
    after = trained_theta(tiny)
    tiny.content["out"] = str(tiny.folder / "anew")
    assert torch.equal(after, trained_theta(tiny))
    assert not torch.equal(after, before)


def test_the_order_of_the_experts_is_that_of_the_initial_gate(tmp_path: Path) -> None:
    tiny = TinyProject.make(tmp_path, experts=2)
    init.initial_gate(tiny.project, 0)
    done = tiny.folder / "out" / "init" / "seed-0" / "done.json"
    assert list(json.loads(done.read_text())["share_of_tokens_that_need"]) == ["e1", "e2"]
    tiny.content["experts"].reverse()
    init.initial_gate(tiny.project, 0)
    assert list(json.loads(done.read_text())["share_of_tokens_that_need"]) == ["e2", "e1"]


def test_columns_that_change_nothing_keep_everything(tiny: TinyProject) -> None:
    before = train.train_run(tiny.project, "collm", 0) / "done.json"
    stamp = before.stat().st_mtime_ns
    rows = [{"q": row.pop("prompt"), **row} for row in examples(24, 0)]
    tiny.content["data"] |= {"train": str(write_jsonl(tiny.folder / "renamed.jsonl", rows)), "prompt": "q"}
    for number, split in ((1, "validation"), (2, "test")):
        write_jsonl(tiny.folder / f"{split}.jsonl", [row | {"q": row["prompt"]} for row in examples(6, number)])
    train.train_run(tiny.project, "collm", 0)
    assert before.stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("fake_pair")
def test_another_column_is_calibrated_and_evaluated_anew(tiny: TinyProject) -> None:
    add_columns(tiny)
    answers = tiny.folder / "out" / "evaluate" / "answers"

    def gold() -> set[str]:
        assert main(["pipeline", "--config", str(tiny.write())]) == 0
        found = [json.loads(file.read_text())["answers"] for file in answers.rglob("*.json")]
        return {answer["gold"][-1] for one in found for answer in one}

    assert gold() == {"!"}
    points = tiny.folder / "out" / "calibrate" / "collm-0" / "curve.json"
    before = points.stat().st_mtime_ns
    tiny.content["data"]["completion"] = "other"
    assert gold() == {"?"}
    assert points.stat().st_mtime_ns > before


class Stopped(Exception):
    pass


def test_an_interrupted_init_is_not_gone_on_with_when_a_bias_is_switched_on(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.content["init"]["steps"] = 8
    step, calls = torch.optim.AdamW.step, iter(range(1000))

    def stop_at_the_fifth(self: torch.optim.AdamW, *args: Any) -> Any:
        if next(calls) == 4:
            raise Stopped
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", stop_at_the_fifth)
        with pytest.raises(Stopped):
            init.initial_gate(tiny.project, 0)
    tiny.content["train"]["bias"] = True
    found = init.initial_gate(tiny.project, 0)
    assert found.bias_K.any()
    # Nor is a finished one taken for another: warm-up decides what it ends with.
    tiny.content["train"]["warm_up"] = 0.9
    assert not torch.equal(init.initial_gate(tiny.project, 0).theta_KD, found.theta_KD)


@pytest.mark.usefixtures("fake_pair")
def test_what_was_made_with_other_settings_is_not_used(tiny: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands run alone: one line that says which one to run first, and nothing steps aside."""
    tiny.content["train"]["methods"] = ["collm", "finetuned"]
    config = ["--config", str(tiny.write())]
    assert main(["train", *config]) == 0
    assert main(["calibrate", *config]) == 0
    out = tiny.folder / "out"
    for command, setting, run, folder in (
        ("calibrate", "train.gate.epochs=3", "train", "train/collm-0"),
        ("evaluate", "train.joint.epochs=1", "train", "train/finetuned-0"),
        ("calibrate", "compute.dtype=bfloat16", "train", "init/seed-0"),
        ("evaluate", "calibrate.refine=0", "calibrate", "calibrate/collm-0"),
    ):
        before = sorted(out.rglob("settings.json"))
        capsys.readouterr()
        assert main([command, *config, "--set", setting]) == 1
        expected = f"{out / folder}: was made with other settings or inputs: run collm train {run} first"
        assert capsys.readouterr().err == f"error: {expected}\n"
        assert sorted(out.rglob("settings.json")) == before
    assert main(["evaluate", *config]) == 0


def test_a_change_anywhere_in_a_big_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = tmp_path / "model", tmp_path / "out" / "hashes.json"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(5 << 20))
    before = ContentHashes(memory).of(model)
    with weights.open("r+b") as stream:
        stream.seek(2 << 20)
        stream.write(b"x")
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000_000))
    after = ContentHashes(memory).of(model)
    assert after != before
    shutil.copytree(model, tmp_path / "copy")
    assert ContentHashes(memory).of(tmp_path / "copy") == after

    def read_again(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(files, "_content_hash", read_again)
    assert ContentHashes(memory).of(model) == after
    (model / "README.md").write_text("Not the model.")
    assert ContentHashes(memory).of(model) == after


def test_the_graph_lists_what_stages_read_before_them() -> None:
    order = list(STAGES)
    for stage in STAGES.values():
        assert all(order.index(name) < order.index(stage.name) for name in stage.inputs), stage.name
        assert stage.resolve(Settings.model_validate(CONTENT)).keys() == set(stage.settings)


@pytest.mark.usefixtures("fake_pair")
def test_hidden_states_are_read_once_and_not_by_a_finished_project(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the largest files of a project."""
    tiny.content |= {"seeds": [0, 1]}
    tiny.content["train"]["methods"] = ["collm", "weak"]
    config = ["--config", str(tiny.write())]
    read: list[str] = []
    load = score.load_scores

    def counted(folder: Path, *rest: Any) -> Any:
        read.append(folder.relative_to(tiny.folder / "out" / "score").as_posix())
        return load(folder, *rest)

    monkeypatch.setattr(score, "load_scores", counted)
    training, held_out = ["train/base", "train/e1"], ["validation/base", "validation/e1"]
    for stage, expected in (
        ("score", []),
        ("init", training),
        ("init", []),
        ("train", training + held_out),
        ("train", []),
    ):
        read.clear()
        assert main([stage, *config]) == 0
        assert sorted(read) == expected, stage

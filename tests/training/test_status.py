"""What ``status`` says, and what ``push`` writes and uploads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from engine.gate import GateArtifact, gate_folder
from tests.training.builders import FakePair, TinyProject
from training.__main__ import main
from training.push import card
from training.status import outputs

pytestmark = pytest.mark.usefixtures("fake_pair")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    made = TinyProject.make(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.serving.Pair", FakePair)
        run(made, "pipeline")
    return made


@pytest.fixture
def trained(whole: TinyProject, tmp_path: Path) -> TinyProject:
    """A copy of a project whose pipeline has run: nothing in it knows in which folder it was made."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    content = json.dumps(whole.content).replace(str(whole.folder), str(tmp_path))
    return TinyProject(tmp_path, json.loads(content))


def states(tiny: TinyProject) -> dict[str, str]:
    return {f"{found.stage}, {found.what}": found.state for found in outputs(tiny.project)}


def run(tiny: TinyProject, *commands: str) -> None:
    for command in commands:
        assert main([command, "--config", str(tiny.write())]) == 0


def test_what_is_done_and_what_waits(tiny: TinyProject) -> None:
    before = states(tiny)
    assert before.pop("score, train, base") == "missing"
    assert not (tiny.folder / "out" / "score").exists()
    assert before["train, collm, seed 0"] == before["calibrate, collm, seed 0"] == before["evaluate, test"] == "waits"
    run(tiny, "score", "init")
    some = states(tiny)
    assert some["score, train, base"] == some["init, seed 0"] == "done"
    assert some["train, collm, seed 0"] == "missing"


def test_all_is_done(trained: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(states(trained).values()) == {"done"}
    run(trained, "status")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith(" done") for line in lines)
    assert lines[0].split() == ["score", "train,", "e1", "done"]


def test_why_something_is_stale(trained: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    trained.content["train"]["gate"]["epochs"] = 3
    capsys.readouterr()
    run(trained, "status")
    said = capsys.readouterr().out
    assert "train      collm, seed 0                stale: settings.epochs was 2, is 3" in said
    assert "calibrate  collm, seed 0                waits for train (collm, seed 0)" in said
    trained.content["train"]["gate"]["epochs"] = 2
    assert set(states(trained).values()) == {"done"}
    trained.content["init"]["steps"] = 21
    stale = {f.stage: f for f in outputs(trained.project)}
    assert stale["init"].why == ("init.steps was 20, is 21",)
    assert stale["train"].why == ("initial gate is another one",)


def test_an_interrupted_stage_is_begun(tiny: TinyProject) -> None:
    run(tiny, "score")
    (tiny.folder / "out/score/train/base/done.json").unlink()
    assert states(tiny)["score, train, base"] == "started"


def test_a_pair_that_is_not_the_calibrated_one_is_stale(trained: TinyProject) -> None:
    gate = trained.folder / "out/pair/gate"
    artifact = GateArtifact.load(gate)
    artifact.theta.add_(1.0)
    artifact.save(gate)
    assert states(trained)["export, pair"] == "stale"


class Hub:
    """What ``huggingface_hub.HfApi`` does, into a folder."""

    folder: Path

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        (self.folder / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: Any, delete_patterns: list[str], commit_message: str
    ) -> None:
        for name in delete_patterns:
            (self.folder / repo_id / name).unlink(missing_ok=True)
        for file in Path(folder_path).iterdir():
            if allow_patterns is None or file.name in allow_patterns:
                shutil.copy(file, self.folder / repo_id)


@pytest.mark.parametrize("mode", ["gate", "joint"])
def test_a_pair_is_uploaded_and_served_by_name(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    monkeypatch.setattr(Hub, "folder", tiny.folder / "hub", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert "gate.safetensors" in allow_patterns
        asked.append((name, revision))
        return str(tiny.folder / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tiny.content["train"]["mode"] = mode
    assert main(["push", "--config", str(tiny.write()), "--to", "me/gate"]) == 1
    assert "calibrate" in capsys.readouterr().err
    run(tiny, "pipeline")
    capsys.readouterr()
    assert main(["push", "--config", str(tiny.write()), "--to", "me/gate"]) == 0
    said = capsys.readouterr().out
    assert 'gate.path = "me/gate"' in said
    assert ('base.model = "me/gate-base"' in said) == (mode == "joint")
    assert (tiny.folder / "hub/me/gate-base/model.safetensors").exists() == (mode == "joint")
    found = GateArtifact.load(gate_folder("me/gate@v1"))
    assert asked == [("me/gate", "v1")]
    assert found.theta.equal(GateArtifact.load(tiny.folder / "out/pair/gate").theta)
    written = (tiny.folder / "hub/me/gate/README.md").read_text()
    assert written == card(tiny.project, "me/gate")
    for part in ('path = "me/gate"', "| Co-LLM |", "- default threshold", "library_name: "):
        assert part in written
    if mode == "joint":
        assert 'model = "me/gate-base"' in written


def test_a_hub_that_cannot_be_reached_is_said(trained: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["push", "--config", str(trained.write()), "--to", "nonsense"]) == 1
    assert "is not OWNER/NAME" in capsys.readouterr().err
    assert main(["push", "--config", str(trained.write())]) == 0
    assert (trained.folder / "out/pair/gate/README.md").exists()


def test_a_refusing_hub_is_one_line(
    trained: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(Hub):
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            raise RuntimeError("401\nno token")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    capsys.readouterr()
    assert main(["push", "--config", str(trained.write()), "--to", "me/gate"]) == 1
    error = capsys.readouterr().err
    assert "me/gate: cannot be uploaded: 401; " in error
    assert "can be uploaded later" in error

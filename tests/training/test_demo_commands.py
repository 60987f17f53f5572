"""The demo's commands: errors and interruptions are one line, and what is gone is made again."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from engine.vllm_hooks.load import make_plan
from server.cli import load_settings
from tests.waiting import eventually

pytest.importorskip("pycountry")

from training.command import run_command
from training.demo import __main__ as demo
from training.demo import changed, pretrain, questions, spelled
from training.demo.pretrain import RECIPES, Cost, make_model
from training.errors import SettingsError

CONFIG = Path(__file__).parents[2] / "deploy" / "training" / "demo.toml"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert demo.main(["--config", str(tmp_path / "absent.toml"), *out]) == 1
    assert "absent.toml: cannot be read" in one_line(capsys)
    config = tmp_path / "demo.toml"
    config.write_text(CONFIG.read_text().replace('name = "codes"', 'name = "other"'))
    assert demo.main(["--config", str(config), *out]) == 1
    assert "experts: the demo's are codes, arithmetic" in one_line(capsys)
    config.write_text(CONFIG.read_text().replace("\ntest = ", "\n# test = "))
    assert demo.main(["--config", str(config), *out]) == 1
    assert "data.test: is needed" in one_line(capsys)
    assert changed.main(["--pair", str(tmp_path / "absent"), *out]) == 1
    assert "absent/codes/config.json: no such file" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    assert questions.main(["--out", str(config)]) == 1
    assert "demo.toml" in one_line(capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    assert run_command(lambda: signal.raise_signal(number), interrupted="nothing is kept") == 130
    assert one_line(capsys) == "error: interrupted; nothing is kept\n"
    assert signal.getsignal(number) == before


def train_long(name: str, directory: Path, _force: bool) -> Cost:
    """In place of ``make_model``, in a worker."""
    directory.mkdir(exist_ok=True)
    if name == "base":
        time.sleep(600)
    return Cost(0.0, 0.0)


def refuse(name: str, directory: Path, _force: bool) -> Cost:
    """The same, where one worker fails while another would go on for long."""
    if name != "base":
        raise SettingsError("no")
    return train_long(name, directory, _force)


@pytest.mark.slow
def test_the_workers_end_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: tmp_path / name for name in RECIPES}

    def work() -> None:
        demo._make_models(models, False)

    def interrupt() -> None:
        eventually(models["base"].exists)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(demo, "make_model", train_long)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_command(work) == 130
    thread.join()
    assert capsys.readouterr().err.startswith("\nerror: interrupted; what was finished is kept")
    monkeypatch.setattr(demo, "make_model", refuse)
    assert run_command(work) == 1
    assert capsys.readouterr().err == "\nerror: no\n"


def test_a_pair_of_different_vocabularies_is_served_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "train_model", lambda recipe, *_, **__: LlamaForCausalLM(recipe.config()))
    out = tmp_path / "pair"
    base = CONFIG.parents[2] / "models" / "demo" / "base"
    assert spelled.main(["--out", str(out), "--base", str(base), "--vocab-size", "600"]) == 0
    assert f"collm serve --config {out / 'pair.toml'}" in capsys.readouterr().out
    plan = make_plan(load_settings(["--config", str(out / "pair.toml")]).engine)
    assert plan.vocabularies == "spelled"
    assert [spoken.size for spoken in plan.spoken] == [1024, 600]
    assert all(spoken.speller is not None for spoken in plan.spoken)
    for wrong, word in (("--base", str(tmp_path)), ("--vocab-size", "1024")):
        assert spelled.main(["--out", str(tmp_path / "other"), wrong, word]) == 1
        assert wrong in one_line(capsys)
    assert not (tmp_path / "other").exists()


def test_a_model_whose_weights_are_gone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def save(_model: object, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "model.safetensors").touch()

    monkeypatch.setattr(pretrain, "documents", lambda *_: [])
    monkeypatch.setattr(pretrain, "train_model", lambda _recipe, _draws, name, **_: made.append(name))
    monkeypatch.setattr(pretrain, "save_model", save)
    for _ in range(2):
        make_model("base", tmp_path / "base", False)
    assert made == ["base"]
    (tmp_path / "base" / "model.safetensors").unlink()
    make_model("base", tmp_path / "base", False)
    assert made == ["base", "base"]

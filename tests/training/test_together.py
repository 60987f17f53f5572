"""Training a base in two processes over gloo: what comes out is what one process makes of it."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.builders import TinyProject, save_model
from tests.training.together import Stopped, stopped_at
from training import command
from training.__main__ import main
from training.errors import SettingsError
from training.fit import CHECKPOINT
from training.joint import micro_batches
from training.processes import Processes, start_processes, started_by_launcher
from training.sharded import CHECKPOINTS, latest
from training.stages import train

LORA = {"rank": 2, "targets": ["q_proj", "v_proj"]}
STOP = 3


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(run)} {name}": tensor
        for file in sorted(run.rglob("*.safetensors"))
        for name, tensor in load_file(str(file)).items()
    }


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240)


def launch(*projects: Any) -> None:
    launched = torchrun("tests.training.together", *map(str, projects))
    assert launched.returncode == 0, launched.stderr


class Trainings:
    """Projects of one pair, scored and with an initial gate. A step of theirs is about one example only."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._first = folder, TinyProject.make(folder / "first")
        save_model(self._first.folder / "base", 1)  # its LM head is its embedding
        self._first.content["train"] |= {"mode": "joint", "bias": True}
        self._first.content["train"]["joint"] |= {"batch_size": 23, "micro_batch_size": 3, "clip": 100.0}
        assert main(["init", "--config", str(self._first.write())]) == 0

    def project(self, name: str, **joint: Any) -> TinyProject:
        made = TinyProject(self._folder / name, copy.deepcopy(self._first.content))
        made.content["out"] = str(made.folder / "out")
        made.content["train"]["joint"] |= joint
        shutil.copytree(self._folder / "first" / "out", made.folder / "out")
        made.write()
        return made

    def alone(self, name: str, **joint: Any) -> None:
        train.train_run(self.project(name, **joint).project, "collm", 0)

    def run(self, name: str) -> Path:
        return self._folder / name / "out" / "train" / "collm-0"

    def check_same(self, name: str, expected: str, *, reduced: bool = False) -> None:
        """What was trained together is what was trained alone, up to the rounding of sums."""
        found, others = tensors(self.run(name)), tensors(self.run(expected))
        assert found.keys() == others.keys()
        assert not (self.run(name) / CHECKPOINTS).exists()
        close = {"rtol": 2e-2, "atol": 2e-3} if reduced else {"rtol": 1e-4, "atol": 1e-5}
        for tensor, values in others.items():
            assert values.dtype == (torch.bfloat16 if reduced and tensor.startswith("base") else torch.float32)
            torch.testing.assert_close(found[tensor], values, **close, msg=lambda text, at=tensor: f"{at}: {text}")

    def changed(self, name: str) -> set[str]:
        """What modules of the base have learned."""
        before, after = tensors(self._first.folder / "base"), tensors(self.run(name) / "base")
        return {name.split(".")[-2] for name, values in before.items() if not torch.equal(after[name].float(), values)}


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """The whole base, interrupted on the way; and adapters."""
    trainings = Trainings(tmp_path)
    adapters: dict[str, Any] = {"lora": LORA, "gradient_checkpointing": True, "clip": 0.01}
    trainings.alone("full")
    trainings.alone("adapters", **adapters)
    together = [trainings.project("full together").folder, trainings.project("adapters together", **adapters).folder]
    launch(f"{together[0]}@{STOP}", *together)
    trainings.check_same("full together", "full")
    trainings.check_same("adapters together", "adapters")
    assert trainings.changed("adapters together") == {"q_proj", "v_proj"}


@pytest.mark.slow
def test_in_reduced_precision_or_going_on_in_another_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint's moments are of the whole batch's gradients, whoever wrote it."""
    trainings = Trainings(tmp_path)
    whole: dict[str, Any] = {"dtype": "bfloat16"}
    adapters: dict[str, Any] = {"dtype": "bfloat16", "lora": LORA, "gradient_checkpointing": True}
    trainings.alone("full")
    trainings.alone("whole", **whole)
    trainings.alone("adapters", **adapters)
    begun_alone, begun_together = (trainings.project(f"begun {how}") for how in ("alone", "together"))
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", stopped_at(STOP))
        with pytest.raises(Stopped):
            train.train_run(begun_alone.project, "collm", 0)
    assert (trainings.run("begun alone") / CHECKPOINT).exists()
    reduced = (trainings.project("whole together", **whole), trainings.project("adapters together", **adapters))
    launch(f"{begun_together.folder}@{STOP}", begun_alone.folder, *(project.folder for project in reduced))
    assert latest(trainings.run("begun together")) == 2
    train.train_run(begun_together.project, "collm", 0)
    trainings.check_same("begun alone", "full")
    trainings.check_same("begun together", "full")
    trainings.check_same("whole together", "whole", reduced=True)
    trainings.check_same("adapters together", "adapters", reduced=True)


def test_a_batch_is_shared_out_whole_and_evenly() -> None:
    for count in (1, 2, 3, 8):
        for size in (1, 3, 16):
            for length in (1, 2, 23, 128):
                numbers = list(range(length))
                shares = [micro_batches(numbers, size, Processes(rank, count)) for rank in range(count)]
                assert len({len(share) for share in shares}) == 1
                assert max(len(batch) for share in shares for batch in share) <= size
                assert sorted(n for share in shares for batch in share for n in batch) == numbers


@pytest.mark.parametrize(
    ("number", "launcher_ends_it", "said"),
    [("0", False, "error: no\n"), ("1", True, ""), ("1", False, "error: process 1: no\n")],
    ids=["the main process", "ended with the main process", "alone with its error"],
)
def test_what_fails_in_all_processes_is_said_once(
    number: str,
    launcher_ends_it: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", number)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if launcher_ends_it:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command.time, "sleep", sleep)

    def fail() -> None:
        raise SettingsError("no")

    assert command.run_command(fail) == 1
    assert capsys.readouterr().err == said
    assert slept == ([] if number == "0" else [command.GRACE])

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert command.run_command(interrupt) == command.INTERRUPTED
    assert ("interrupted" in capsys.readouterr().err) == (number == "0")


def test_two_processes_say_once_what_both_fail_at(tmp_path: Path) -> None:
    failed = torchrun("training", "train", "--config", str(tmp_path / "absent.toml"))
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    # Where starting took so long that the launcher had ended nobody, the other one says who it is.
    (line,) = (each for each in said if not each.startswith("error: process 1: "))
    assert "absent.toml: cannot be read" in line


def test_what_one_process_has_to_do_is_refused_by_name(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pipeline", "--config", str(tiny.write())]) == 1
    assert "pipeline is one process's work: start it without a launcher" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="WORLD_SIZE is 2, but RANK is not set"):
        started_by_launcher({"WORLD_SIZE": "2"})
    for value in ("two", "0", "-1", "1.5", ""):
        monkeypatch.setenv("WORLD_SIZE", value)
        assert main(["train", "--config", str(tiny.write())]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: WORLD_SIZE is {value!r}, which is not a whole number from 1 up")
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for number, message in (("main", "RANK is 'main'"), ("2", "RANK is 2, but WORLD_SIZE is 2")):
        with pytest.raises(SettingsError, match=message):
            started_by_launcher(started | {"RANK": number})
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=r"compute\.device: cuda:0: each process has a GPU of its own"):
        start_processes(torch.device("cuda:0"))
    monkeypatch.delenv("WORLD_SIZE")
    for stage, message in ((None, "run collm train init first"), ("init", "trains in one process")):
        if stage is not None:
            assert main([stage, "--config", str(tiny.write())]) == 0
        with pytest.raises(Exception, match=message):
            train.run(tiny.project, Processes(0, 2))

"""A contender that does not start costs the others nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import compare
from bench.account import Account
from bench.contenders.base import Stamp
from bench.errors import BenchError
from bench.settings import Settings
from bench.shapes import Pair
from bench.workload import Cell, Job

SIZE: dict[str, Any] = {"rounds": 2, "requests": 1, "max_tokens": 4, "seed": 1}


class Process:
    """A service that does nothing, in a process that can be frozen."""

    def __init__(self, name: str, starts: bool) -> None:
        self.name = name
        self.starts = starts
        self.tries = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        self.tries += 1
        if not self.starts:
            raise BenchError(f"{self.name} ended with status 1 while it was starting")
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


class Instant:
    """A contender whose tokens cost nothing."""

    slow = False

    def __init__(self, name: str, *services: Process) -> None:
        self.name = name
        self.services = services

    def takes(self, cell: Cell) -> bool:
        return True

    async def open(self) -> None:
        pass

    async def run(self, job: Job, stamp: Stamp) -> int:
        stamp()
        stamp()
        return job.max_tokens

    def account(self) -> Account | None:
        return None

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("starts", ["once", "each-round"])
async def test_the_others_are_measured_and_it_is_said(
    starts: Any, tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Process("good", True), Process("bad", False)
    taking_part = [
        Instant(compare.ENGINE, good),
        Instant(compare.EXPERT, bad),
        Instant(compare.PER_TOKEN_HTTP, good, bad),
    ]
    monkeypatch.setattr(compare, "contenders", lambda *_: taking_part)
    settings = Settings(tiny, max_num_seqs=4, request_tokens=64)
    report = await compare.measure(settings, [Cell(1, 0.3, "short")], starts=starts, workdir=tmp_path, **SIZE)
    assert [cell["contender"] for cell in report.data["cells"]] == [compare.ENGINE]
    assert report.data["cells"][0]["tokens"] == [4, 4]
    reason = "bad ended with status 1 while it was starting"
    assert report.failures == (f"{compare.EXPERT}: {reason}", f"{compare.PER_TOKEN_HTTP}: {reason}")
    assert f"Did not start: {compare.EXPERT}: {reason}" in report.text
    assert bad.tries == 1
    assert report.record()["failures"] == report.failures


def test_the_command_says_so_last_and_fails(
    tiny: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def measured(*_: Any) -> list[Any]:
        return [command.Report("text", {"measurement": "compare"}, [], ("stock base: ended",))]

    monkeypatch.setattr(command, "_run", measured)
    assert command.main(["compare", "--shape", "tiny", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "text" in out
    assert err.splitlines()[-1] == "error: stock base: ended"

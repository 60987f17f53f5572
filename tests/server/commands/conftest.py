from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.packaging.sources import ROOT
from tests.server.commands.servers import standins

COMMAND = [sys.executable, "-m", "server.commands"]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str = ""


def environment(url: str | None, **more: str) -> dict[str, str]:
    """What a command sees: nothing of this process's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COLLM_", "_COLLM", "NO_COLOR"))}
    return {**kept, "TERM": "xterm-256color", **({} if url is None else {"COLLM_URL": url}), **more}


def piped(arguments: Sequence[str], url: str | None = None, stdin: str = "", **env: str) -> Result:
    """Run ``collm`` without a terminal."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT, env=environment(url, **env), input=stdin, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


class Terminal:
    """``collm`` in a pseudo-terminal: both of its output streams, and what it echoes."""

    def __init__(self, arguments: Sequence[str], url: str | None, **env: str) -> None:
        self._master, slave = pty.openpty()
        env = environment(url, COLUMNS="120", LINES="40", **env)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=ROOT, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self.shown = ""
        self._bytes = b""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def see(self, text: str, seconds: float = 60.0) -> None:
        """Wait for a text."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            # In this order: what it wrote before its end is there to be read once it has ended.
            ended = self.process.poll() is not None
            assert self._read() or not ended, self.shown
            time.sleep(0.02)

    def end(self, seconds: float = 60.0) -> Result:
        """Wait for the command to end."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            self._read()
            if time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"it did not end: {self.shown!r}")
            time.sleep(0.02)
        while self._read():  # one gives no more than a page
            pass
        return Result(self.process.returncode, self.shown)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # nothing there, or the other end is closed
            return False
        self._bytes += data
        self.shown = self._bytes.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)


@pytest.fixture
def terminal() -> Iterator[type[Terminal]]:
    """Makes terminals, and closes them in the end."""
    made: list[Terminal] = []

    class Kept(Terminal):
        def __init__(self, *arguments: object, **env: str) -> None:
            super().__init__(*arguments, **env)  # type: ignore[arg-type]
            made.append(self)

    yield Kept
    for each in made:
        each.close()


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Stand-in lanes."""
    with standins(tmp_path_factory.mktemp("standins"), step_seconds=0.005) as address:
        yield address


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for the key "right"."""
    with standins(tmp_path_factory.mktemp("locked"), keys=["right"]) as address:
        yield address

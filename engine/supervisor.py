"""The engine's process, as its parent sees it: started safely, watched, killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from engine.errors import EngineStartupError


class EngineProcess:
    """A child process that runs :mod:`engine.process`. Use :meth:`start`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, directory: Path) -> EngineProcess:
        """Start one that talks over the sockets in ``directory``.

        Raises:
            EngineStartupError: the operating system refuses.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "engine.process",
                str(directory),
                env=safe_environment(),
                stdin=asyncio.subprocess.PIPE,
                # A session of its own: signals from the terminal are the parent's to handle.
                start_new_session=True,
            )
        except OSError as error:
            raise EngineStartupError(f"the engine process cannot be started: {error}") from error
        return cls(process)

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait until it has ended; the exit status, negative for a signal."""
        return await self._process.wait()

    def kill(self) -> None:
        """End it at once; nothing if it has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def safe_environment() -> dict[str, str]:
    """For the engine's process and those that vLLM starts from it: none looks for modules in the current folder.

    A file ``engine.py`` there would be run in the place of this package.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        # A checkout, which may be found by nothing but the current folder.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return environment

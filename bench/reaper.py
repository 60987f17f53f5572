"""Ends what a killed bench leaves behind: servers that are frozen cannot notice that their parent is gone.

A process of its own, ``python -m bench.reaper``. It is told which processes to look after, one id per line, and kills
them, and all that share their session, when its standard input closes.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

from bench import processes

_reaper: subprocess.Popen[bytes] | None = None


def look_after(pid: int) -> None:
    """Have a process, and the session that it leads if it leads one, killed when this process is gone."""
    global _reaper
    if _reaper is None:
        # A session of its own: what ends the bench must not end its reaper.
        _reaper = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, start_new_session=True)
        atexit.register(_reaper.wait)
        assert _reaper.stdin is not None
        atexit.register(_reaper.stdin.close)
    assert _reaper.stdin is not None
    _reaper.stdin.write(f"{pid}\n".encode())
    _reaper.stdin.flush()


def main(lines: Iterable[str]) -> None:
    """Read ids until the end, then kill."""
    leaders = {int(line) for line in lines} - {os.getpid()}
    for pid in processes.of_sessions(leaders):
        processes.send(pid, signal.SIGKILL)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    main(sys.stdin)

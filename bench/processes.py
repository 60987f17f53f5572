"""Process trees: memory, freezing, ending. Linux only, like vLLM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import psutil

_GONE = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


def tree(pid: int) -> list[int]:
    """A process and all its living descendants, parents before children."""
    return [member.pid for member in _tree(pid)]


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [member for member in (root, *root.children(recursive=True)) if _lives(member)]
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() not in _GONE
    except psutil.NoSuchProcess:
        return False


def of_sessions(leaders: set[int]) -> list[int]:
    """These processes, and all that are in a session that one of them leads."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid in leaders or os.getsid(pid) in leaders:
                found.append(pid)
    return found


def rss_bytes(pid: int) -> int:
    """Resident memory of a tree now, in bytes. Pages that processes share count once for each."""
    total = 0
    for member in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total


def peak_rss_bytes(pid: int) -> int:
    """Sum of the peaks of a tree's living processes, in bytes. psutil does not know them."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(OSError):
            match = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{member}/status").read_text(), re.M)
            total += int(match[1]) * 1024 if match else 0
    return total


def cpu_seconds(pid: int) -> float:
    """Processor time of a tree's living processes, of all their threads."""
    total = 0.0
    for member in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def freeze(pid: int) -> None:
    """Stop a tree: it keeps its memory and takes no CPU time until it is thawed."""
    for member in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.suspend()


def thaw(pid: int) -> None:
    """Let a frozen tree go on."""
    for member in reversed(_tree(pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.resume()


def end(pid: int, seconds: float = 20.0) -> None:
    """End a tree: ask its root, wait, then kill what is left of the tree."""
    thaw(pid)
    members = _tree(pid)
    send(pid, signal.SIGTERM)
    # Not psutil.wait_procs: it would take a child's exit status from the Popen that waits for it.
    deadline = time.monotonic() + seconds
    while any(map(_lives, members)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

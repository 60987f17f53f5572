"""Process trees: memory, freezing, ending. Reads /proc, so Linux only, like vLLM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

_PROC = Path("/proc")


def tree(pid: int) -> list[int]:
    """A process and all its living descendants, parents before children."""
    children: dict[int, list[int]] = {}
    for member in _all():
        parent = _parent(member)
        if parent is not None:
            children.setdefault(parent, []).append(member)
    found = [pid] if _parent(pid) is not None else []
    for member in found:
        found += children.get(member, [])
    return found


def of_sessions(leaders: set[int]) -> list[int]:
    """These processes, and all that are in a session that one of them leads."""
    found = []
    for pid in _all():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid in leaders or os.getsid(pid) in leaders:
                found.append(pid)
    return found


def _all() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _parent(pid: int) -> int | None:
    """Parent's id; None if the process is gone or a zombie."""
    try:
        # The name, in parentheses, may hold anything.
        state, parent = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(parent)


def _memory(pids: list[int], field: str) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            match = re.search(rf"^{field}:\s+(\d+) kB$", (_PROC / str(pid) / "status").read_text(), re.M)
            total += int(match[1]) * 1024 if match else 0
    return total


def rss_bytes(pid: int) -> int:
    """Resident memory of a tree now, in bytes. Pages that processes share count once for each."""
    return _memory(tree(pid), "VmRSS")


def peak_rss_bytes(pid: int) -> int:
    """Sum of the peaks of a tree's living processes, in bytes."""
    return _memory(tree(pid), "VmHWM")


def freeze(pid: int) -> None:
    """Stop a tree: it keeps its memory and takes no CPU time until it is thawed."""
    for member in tree(pid):
        send(member, signal.SIGSTOP)


def thaw(pid: int) -> None:
    """Let a frozen tree go on."""
    for member in reversed(tree(pid)):
        send(member, signal.SIGCONT)


def end(pid: int, seconds: float = 20.0) -> None:
    """End a tree: ask its root, wait, then kill what is left of the tree."""
    thaw(pid)
    members = tree(pid)
    send(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while any(_parent(member) is not None for member in members) and time.monotonic() < deadline:
        time.sleep(0.05)
    for member in members:
        send(member, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

"""Freezing, measuring and ending process trees, on a real one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import processes
from tests.waiting import eventually

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time\\nwhile True: time.sleep(0.01)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        yield parent, child
        processes.end(parent.pid, seconds=0)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_freezes_thaws_and_ends_a_tree(family: tuple[subprocess.Popen[str], int]) -> None:
    parent, child = family
    assert processes.tree(parent.pid) == [parent.pid, child]
    processes.freeze(parent.pid)
    eventually(lambda: state(parent.pid) == state(child) == "T")
    assert processes.rss_bytes(parent.pid) > 2 << 20
    assert processes.peak_rss_bytes(parent.pid) >= processes.rss_bytes(parent.pid)
    processes.thaw(parent.pid)
    eventually(lambda: "T" not in (state(parent.pid), state(child)))
    processes.freeze(parent.pid)
    begin = time.monotonic()
    processes.end(parent.pid, seconds=1.0)
    assert time.monotonic() - begin < 10
    eventually(lambda: processes.tree(child) == [])


def test_a_tree_that_is_gone_is_empty() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert processes.tree(process.pid) == []
    assert processes.rss_bytes(process.pid) == 0


def test_a_killed_bench_leaves_no_frozen_server_behind() -> None:
    """The server leads a session, as bench's servers do, has a child, and both are stopped when the bench is killed."""
    script = """
import subprocess, sys, time
from bench import processes, reaper
child = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
server = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
reaper.look_after(server.pid)
while len(processes.tree(server.pid)) < 2:
    time.sleep(0.02)
processes.freeze(server.pid)
print(*processes.tree(server.pid), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        servers = [int(pid) for pid in bench.stdout.readline().split()]
        assert len(servers) == 2
        bench.kill()
    eventually(lambda: not any(processes.tree(pid) for pid in servers))

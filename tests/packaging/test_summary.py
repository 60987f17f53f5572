"""What a run of the tests says at its end."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.packaging.sources import ROOT

TESTS = ["tests/packaging/test_links.py", "tests/docs/test_configuration.py"]


def test_each_folder_s_time_and_then_pytest_s_own_line() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *TESTS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    lines = run.stdout.rstrip().splitlines()
    assert re.fullmatch(r"\d+ passed.* in .*s.*", lines[-1])
    begin = next(index for index, line in enumerate(lines) if "time per folder" in line)
    rows = [re.fullmatch(r" *(\d+\.\d) s +(\d+) tests  (\S+)", line) for line in lines[begin + 1 : begin + 3]]
    assert {row[3] for row in rows if row} == {"tests/packaging", "tests/docs"}
    assert sum(int(row[2]) for row in rows if row) == int(lines[-1].split()[0])

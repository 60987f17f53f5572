"""What a run of the tests in two processes says, as ``make test`` runs them."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.packaging.sources import ROOT

TESTS = ["tests/packaging/test_links.py", "tests/docs/test_configuration.py"]


def test_each_folder_s_time_and_then_pytest_s_own_line() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-n", "2", *TESTS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    lines = run.stdout.rstrip().splitlines()
    passed = re.search(r"(\d+) passed.* in .*s.*", lines[-1])
    assert passed
    begin = next(index for index, line in enumerate(lines) if "time per folder" in line)
    rows = [row for line in lines[begin:] if (row := re.fullmatch(r" *(\d+\.\d) s +(\d+) tests  (\S+)", line))]
    assert {row[3] for row in rows} == {"tests/packaging", "tests/docs"}
    assert sum(int(row[2]) for row in rows) == int(passed[1])
    # A file's tests stay in one process.
    ran = [match.groups() for line in lines if (match := re.match(r"\[(gw\d)\].* PASSED ([^:]+)::", line))]
    assert len(ran) == int(passed[1])
    assert len(set(ran)) == len(TESTS)

"""What a run of the tests says at its end: how long each folder took, and what tests measured.

A plugin of pytest. Where tests run in several processes, the reports bring everything to the one that prints.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

MEASURED = "measured"
_noted: list[str] = []
_figures: list[str] = []
_seconds: Counter[str] = Counter()
_tests: Counter[str] = Counter()


def figure(line: str) -> None:
    """Note something that the running test measured; it is shown at the end and held against nobody."""
    _noted.append(line)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    """Send what was noted along with the test's report."""
    item.user_properties += [(MEASURED, line) for line in _noted]
    _noted.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's set-up, call and tear-down to its folder's time; who shares an engine first pays for its start."""
    folder = "/".join(Path(report.nodeid.partition("::")[0]).parts[:2])
    _seconds[folder] += report.duration
    _tests[folder] += report.when == "call"
    if report.when == "teardown":
        _figures.extend(str(line) for name, line in report.user_properties if name == MEASURED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("measured")
        for line in _figures:
            terminalreporter.write_line(line)
    if len(_seconds) > 1:
        terminalreporter.section("time per folder")
        for folder, seconds in _seconds.most_common():
            terminalreporter.write_line(f"{seconds:7.1f} s  {_tests[folder]:5} tests  {folder}")

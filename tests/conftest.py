"""For all tests."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.live import LiveServer, serving_demo

# How long an example takes says more of the machine's other work than of the code; pytest's timeout bounds each test.
# In CI the same examples every time.
settings.register_profile(
    "collm",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    print_blob=True,
)
settings.load_profile("collm")

# A shell has what it starts in the background ignore Ctrl-C, and so would all programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server of the demo pair for whoever is content with any: command line, pages, SDK, browser."""
    with serving_demo(tmp_path_factory.mktemp("demo")) as server:
        yield server


_seconds: Counter[str] = Counter()
_tests: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's set-up, call and tear-down to its folder's time; who shares an engine first pays for its start."""
    folder = "/".join(Path(report.nodeid.partition("::")[0]).parts[:2])
    _seconds[folder] += report.duration
    _tests[folder] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how long each folder took."""
    if len(_seconds) > 1:
        terminalreporter.section("time per folder")
        for folder, seconds in _seconds.most_common():
            terminalreporter.write_line(f"{seconds:7.1f} s  {_tests[folder]:5} tests  {folder}")

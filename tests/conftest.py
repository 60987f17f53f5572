"""For all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.live import LiveServer, serving_demo

pytest_plugins = ["tests.groups", "tests.summary", "tests.forking"]

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

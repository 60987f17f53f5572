from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.conftest import ROOT, LiveServer, start_server


@pytest.fixture(scope="package")
def demo() -> Iterator[LiveServer]:
    """The demo pair on real engines, which the pages' examples talk to."""
    server = start_server(ROOT / "deploy" / "config" / "demo.toml")
    yield server
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0

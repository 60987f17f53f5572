"""The OpenAI SDK's client of the live server, and what it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.live import LiveServer
from tests.packaging.sources import ROOT
from tests.waiting import eventually


@pytest.fixture
def client(demo: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def questions() -> list[dict[str, Any]]:
    """The demo pair's held-out questions: neither base nor gate training contains their entities."""
    everything = json.loads((ROOT / "models" / "demo" / "questions.json").read_text())
    return [item for item in everything if item["split"] == "test"]


@pytest.fixture(autouse=True)
def _everything_is_freed(demo: LiveServer) -> Iterator[None]:
    """After every test both lanes are at zero."""
    yield
    eventually(demo.is_empty)

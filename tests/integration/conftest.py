"""A live server: ``python -m server`` with the shipped demo pair on real vLLM engines, as a user starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import eventually

ROOT = Path(__file__).parents[2]


@dataclass
class LiveServer:
    process: subprocess.Popen[bytes]
    url: str

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics as ``name{label=value,...}`` with labels sorted, model_name left out."""
        found = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
                inner = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
                key = f"{sample.name}{{{inner}}}"
                found[key] = found.get(key, 0.0) + sample.value
        return found

    def is_empty(self) -> bool:
        """No request in the server, nothing in either lane."""
        now = self.metrics()
        gauges = ("collm_requests_running", "collm_requests_waiting", "collm_lane_kv_cache_usage_ratio")
        return all(value == 0.0 for name, value in now.items() if name.startswith(gauges))


def start_server(config: Path, *arguments: str) -> LiveServer:
    """Start a server on a free port and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "--config", str(config), "--port", str(port), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    server = LiveServer(process, f"http://127.0.0.1:{port}")

    def ready() -> bool:
        assert process.poll() is None, "the server ended while it was starting"
        try:
            return httpx.get(f"{server.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    eventually(ready, seconds=240)
    return server


@pytest.fixture(scope="session")
def live() -> Iterator[LiveServer]:
    server = start_server(ROOT / "deploy" / "config" / "demo.toml")
    yield server
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def questions() -> list[dict[str, Any]]:
    """The demo pair's held-out questions: neither base nor gate training contains their entities."""
    everything = json.loads((ROOT / "models" / "demo" / "questions.json").read_text())
    return [item for item in everything if item["split"] == "test"]


@pytest.fixture(autouse=True)
def _everything_is_freed(live: LiveServer) -> Iterator[None]:
    """After every test both lanes are at zero."""
    yield
    eventually(live.is_empty)

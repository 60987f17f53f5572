"""A live server: ``collm serve`` with the shipped demo pair on real vLLM engines, as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.packaging.sources import ROOT
from tests.waiting import eventually


def samples(text: str) -> dict[str, float]:
    """Every sample of a /metrics page as ``name{label=value,...}``, labels sorted, summed over models and policies."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "policy")}
            inner = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            key = f"{sample.name}{{{inner}}}"
            found[key] = found.get(key, 0.0) + sample.value
    return found


@dataclass
class LiveServer:
    url: str

    def metrics(self) -> dict[str, float]:
        """What /metrics says just now; see :func:`samples`."""
        return samples(httpx.get(f"{self.url}/metrics").text)

    def is_empty(self) -> bool:
        """No request in the server, nothing in either lane."""
        now = self.metrics()
        gauges = ("collm_requests_running", "collm_requests_waiting", "collm_lane_kv_cache_usage_ratio")
        return all(value == 0.0 for name, value in now.items() if name.startswith(gauges))


def announced_address(process: subprocess.Popen[bytes] | subprocess.Popen[str], log: Path, seconds: float) -> str:
    """Where a server says that it is ready, once it does."""
    address: list[str] = []

    def ready() -> bool:
        said = log.read_text()
        assert process.poll() is None, said
        address[:] = re.findall(r"^ready at (\S+)$", said, re.M)
        return bool(address)

    eventually(ready, seconds=seconds)
    return address[0]


def serving_demo(folder: Path) -> AbstractContextManager[LiveServer]:
    """The demo pair, see :func:`serving`."""
    return serving(Path("deploy/config/demo.toml"), folder)


@contextmanager
def serving(config: Path, folder: Path) -> Iterator[LiveServer]:
    """The server, ready, on a free port; its output goes to a file in ``folder``. In the end it must exit with 0."""
    log = folder / "log"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COLLM_", "_COLLM"))}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.commands", "serve", "--config", str(config), "--port", "0"],
            cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        yield LiveServer(announced_address(process, log, seconds=240))
    finally:
        process.terminate()
        status = process.wait(timeout=60)
    assert status == 0, log.read_text()

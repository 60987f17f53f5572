"""Live servers, on stand-in lanes and on the demo pair, load on them, and a real Prometheus that scrapes them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deployment.sources import PROMETHEUS, need
from tests.live import announced_address
from tests.packaging.sources import ROOT
from tests.server.fakes import byte_level_tokenizer

CONFIG = """
served_model_name = "collm-live"
tokenizer = "{folder}"

[base]
model = "standin-base"
backend = "bench.standin"
vllm = {{ vocab_size = {vocabulary}, max_model_len = 256, kv_tokens = 700, step_seconds = 0.003 }}

[[experts]]
name = "codes"
model = "standin-codes"
backend = "bench.standin"
vllm = {{ vocab_size = {vocabulary}, max_model_len = 256, kv_tokens = 700, step_seconds = 0.006 }}

[gate]
threshold = 0.45

[scheduler]
max_num_seqs = 8

[server]
port = 0
max_queued_requests = 8
access_log = false
"""
POLICIES: list[dict[str, Any] | None] = [
    None,
    {"policy": "threshold", "threshold": 0.6},
    {"policy": "sample"},
    {"policy": "always"},
    {"policy": "never"},
    {"policy": "random", "rate": 0.3},
    {"policy": "confidence"},
    {"policy": "always", "max_expert_tokens": 5},
]


def wait_until(what: str, ready: Callable[[], bool], seconds: float = 60.0) -> None:
    """Ask again and again.

    Raises:
        TimeoutError: it did not come true.
    """
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.2)


def end(process: subprocess.Popen[str], signum: int = signal.SIGTERM) -> None:
    """End a process that is ours."""
    process.send_signal(signum)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def standin_pair(folder: Path) -> list[str]:
    """Arguments of a server of two stand-in lanes."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = folder / "collm.toml"
    config.write_text(CONFIG.format(folder=folder, vocabulary=tokenizer.get_vocab_size()))
    return ["--config", str(config)]


def demo_pair() -> list[str]:
    """Arguments of a server of the demo pair on vLLM, with so few places that some of the load is turned away."""
    places = ["--scheduler.max_num_seqs", "8", "--server.max_queued_requests", "8"]
    return ["--config", str(ROOT / "deploy/config/demo.toml"), "--port", "0", *places, "--no-server.access_log"]


@contextlib.contextmanager
def served(folder: Path, arguments: Sequence[str]) -> Iterator[str]:
    """A running server; gives its address."""
    command = [sys.executable, "-m", "server", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COLLM_")}
    log = (folder / "server.log").open("w+")
    with log, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True) as process:
        try:
            yield announced_address(process, folder / "server.log", seconds=240)
        finally:
            # Twice: not to wait for what is in flight.
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            end(process)


class Load:
    """Requests of every kind, until it is closed: streams and whole answers, all policies, some given up, some wrong.

    Attributes:
        statuses: how many responses had which status; 0 are those that were given up.
    """

    def __init__(self, address: str, model: str, clients: int = 20) -> None:
        self.statuses: dict[int, int] = {}
        self._address = address
        self._model = model
        self._clients = clients
        self._stop = threading.Event()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._failure: BaseException | None = None

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self._clients)
        async with httpx.AsyncClient(base_url=self._address, timeout=60, limits=limits) as http:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._clients):
                        group.create_task(self._client(http))
            except BaseExceptionGroup as failures:
                self._failure = failures.exceptions[0]

    async def _client(self, http: httpx.AsyncClient) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            status = await self._request(http, number)
            self.statuses[status] = self.statuses.get(status, 0) + 1
            if status == 429:
                await asyncio.sleep(0.2)

    async def _request(self, http: httpx.AsyncClient, number: int) -> int:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": f"Request number {number}: hello world, hello there!",
            "max_tokens": 20 + number * 7 % 60,
        }
        kind = number % 12
        if kind == 0:
            body["temperature"] = 9
        elif kind == 1:
            body["model"] = f"{self._model}/{('base', 'codes')[number // 12 % 2]}"
        elif (policy := POLICIES[number % len(POLICIES)]) is not None:
            body["collaboration"] = policy
        if kind in (2, 3, 4):
            return (await http.post("/v1/completions", json=body)).status_code
        if kind == 5:
            body["max_tokens"] = 200
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            count = 0
            async for line in response.aiter_lines():
                count += bool(line)
                if kind == 5 and count > 3:
                    return 0
            return response.status_code


@dataclass
class Prometheus:
    """A running Prometheus."""

    address: str

    def _get(self, path: str, **parameters: str) -> Any:
        response = httpx.get(f"{self.address}/api/v1/{path}", params=parameters, timeout=20)
        body = response.json()
        assert body["status"] == "success", f"{parameters}: {body}"
        return body["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series that a query has now.

        Raises:
            AssertionError: Prometheus does not take the query.
        """
        return [(series["metric"], float(series["value"][1])) for series in self._get("query", query=expr)["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Loaded rules with their health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """Scraped targets with their health."""
        return self._get("targets")["activeTargets"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration, but for the server's address and a scrape every second."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{sock.getsockname()[1]}"
    content = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    content["rule_files"] = [str(PROMETHEUS / pattern) for pattern in content["rule_files"]]
    for job, address in zip(content["scrape_configs"], (target, listen), strict=True):
        job["static_configs"] = [{"targets": [address]}]
    config = folder / "prometheus.yml"
    config.write_text(json.dumps(content))
    command = [
        need("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={listen}",
        "--log.level=warn",
    ]
    log = (folder / "prometheus.log").open("w+")
    with log, subprocess.Popen(command, stdout=log, stderr=log, text=True) as process:
        try:
            found = Prometheus(f"http://{listen}")

            def ready() -> bool:
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"{found.address}/-/ready").status_code == 200
                return False

            wait_until("Prometheus is ready", ready)
            yield found
        finally:
            end(process)

"""Live servers that are there to be mistreated: the shipped demo pair, with its processes and their log at hand.

Of its experts only ``codes``: what goes wrong in a lane does not depend on how many there are, and starts take long.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from engine.gate import GateArtifact
from tests.live import samples
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "config" / "demo.toml"
MODEL = "collm-demo"
QUESTIONS: list[dict[str, Any]] = json.loads((ROOT / "models" / "demo" / "questions.json").read_text())
PROMPTS = [item["prompt"] for item in QUESTIONS if item["split"] == "test"]
START_SECONDS = 240.0
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True, "collaboration": {"policy": "random", "rate": 0.5}}
"""Fields of a request that takes long and keeps both lanes busy."""


@dataclass
class FaultServer:
    """A live server.

    Attributes:
        log: what it and its processes wrote on either stream.
        key: API key that is sent where the server asks for one.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    key: str | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def http(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False, **options)

    def metrics(self) -> dict[str, float]:
        """What /metrics says just now; see :func:`tests.live.samples`."""
        with self.http() as http:
            return samples(http.get("/metrics").text)

    def metric(self, key: str) -> float:
        return self.metrics().get(key, 0.0)

    def outcomes(self, outcome: str) -> float:
        """How many generation requests ended like this."""
        return self.metric(f"collm_requests_total{{outcome={outcome}}}")

    def is_empty(self) -> bool:
        """No request in the server, nothing in either lane, and none ever forgotten in one."""
        now = self.metrics()
        gauges = (
            "collm_requests_running", "collm_requests_waiting", "collm_lane_kv_cache_usage_ratio",
            "collm_lane_batch_rows", "collm_integrity_errors_total",
        )  # fmt: skip
        return all(value == 0.0 for name, value in now.items() if name.startswith(gauges))

    def complete(self, prompt: Any = None, **fields: Any) -> httpx.Response:
        """One greedy completion, not streamed."""
        body = {"model": MODEL, "prompt": PROMPTS[0] if prompt is None else prompt, "temperature": 0, **fields}
        with self.http() as http:
            return http.post("/v1/completions", json=body)

    def text(self, prompt: Any = None, **fields: Any) -> str:
        """Text of one greedy completion."""
        response = self.complete(prompt, max_tokens=fields.pop("max_tokens", 40), **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def status_of(self, path: str) -> int:
        with self.http() as http:
            return http.get(path).status_code

    def is_ready(self) -> bool:
        try:
            return self.status_of("/ready") == 200
        except httpx.TransportError:
            return False

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.output()}"
            return self.is_ready()

        eventually(ready, seconds)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def parent(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def tree(self) -> list[psutil.Process]:
        """The HTTP process, the engine's, and the workers'."""
        parent = self.parent()
        return [parent, *parent.children(recursive=True)]

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = [child for child in self.parent().children() if "engine.process" in child.cmdline()]
        return engine

    def workers(self) -> list[psutil.Process]:
        """Worker processes of lanes with executor mp, in the order of the lanes."""
        children = [child for child in self.engine().children(recursive=True) if "Worker" in child.name()]
        return sorted(children, key=psutil.Process.create_time)

    def check_good(self) -> None:
        """What every case ends with: a good request is answered, and both lanes are at zero."""
        assert self.process.poll() is None, f"the server ended:\n{self.output()}"
        text = self.text(PROMPTS[1], max_tokens=16)
        assert text == GOOD_ANSWERS.setdefault(PROMPTS[1], text)
        eventually(self.is_empty)

    def end(self) -> None:
        """End the server, and whatever of its processes is left."""
        tree: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            tree = self.tree()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
                process.kill()


GOOD_ANSWERS: dict[str, str] = {}
"""The first answer of any server to a prompt, which every later one must repeat: all serve the same pair, greedily."""


def gate_of_codes() -> GateArtifact:
    """The demo pair's gate as it is for the expert ``codes`` alone."""
    return GateArtifact.load(ROOT / "models" / "demo" / "gate").only("codes")


def config_file(directory: Path, **changes: Any) -> Path:
    """The demo's configuration, with the expert ``codes`` alone, with changes, as a file.

    ``base__executor="mp"`` changes one value; ``experts__...`` changes it in the only expert; None takes it out.
    """
    content = tomllib.loads(DEMO.read_text())
    content["experts"] = content["experts"][:1]
    # Paths count from the configuration's own folder, and this one is written elsewhere.
    for lane in (content["base"], *content["experts"]):
        lane["model"] = str((DEMO.parent / lane["model"]).resolve())
    gate_of_codes().save(directory / "gate-of-codes")
    content["gate"]["path"] = str(directory / "gate-of-codes")
    for path, value in changes.items():
        *tables, name = path.split("__")
        table = content
        for key in tables:
            table = table.setdefault(key, {})
            table = table[0] if isinstance(table, list) else table
        if value is None:
            table.pop(name, None)
        else:
            table[name] = value
    file = directory / f"config-{len(list(directory.glob('config-*.toml')))}.toml"
    file.write_text("\n".join(_toml(content)) + "\n")
    return file


def kv_bytes(member: str, blocks: int) -> int:
    """Bytes that so many KV blocks (of 32 tokens, in float32) take in a member of the demo pair."""
    config = json.loads((ROOT / "models" / "demo" / member / "config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    return blocks * 32 * int(per_token)


def _toml(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    # JSON's strings, numbers, booleans and flat lists are TOML's.
    nested = {key: value for key, value in table.items() if isinstance(value, dict) or key == "experts"}
    for key, value in table.items():
        if key not in nested:
            yield f"{key} = {json.dumps(value)}"
    for key, value in nested.items():
        for item in value if isinstance(value, list) else [value]:
            yield f"[[{prefix}{key}]]" if isinstance(value, list) else f"[{prefix}{key}]"
            yield from _toml(item, f"{prefix}{key}.")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(
    config: Path, directory: Path, *arguments: str, key: str | None = None, port: int | None = None
) -> FaultServer:
    """Start a server, on a free port unless one is given; does not wait."""
    port = port or free_port()
    log = directory / f"server-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "--config", str(config), "--port", str(port), *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return FaultServer(process, f"http://127.0.0.1:{port}", log, key)


@contextmanager
def serving(directory: Path, *arguments: str, key: str | None = None, **changes: Any) -> Iterator[FaultServer]:
    """A server that is ready, with the demo's configuration and changes; ended afterwards, whatever was done to it."""
    server = launch(config_file(directory, **changes), directory, *arguments, key=key)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


@dataclass
class Outcome:
    """What a client saw of one request: a status, a body or events, and when it was over."""

    status: int
    events: list[Any]
    ended: float
    error: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        return bool(self.events) and self.events[-1] == "[DONE]"


def request(server: FaultServer, stream: bool, prompt: str, **fields: Any) -> Outcome:
    """Send one completion request and see it through, whatever comes. Status 0: the connection broke."""
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "stream": stream, **fields}
    events: list[Any] = []
    status = 0
    error = None
    try:
        with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
            status = response.status_code
            for line in response.iter_lines():
                if not line:
                    continue
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
    except httpx.TransportError:
        status = 0
    for event in events:
        if isinstance(event, dict) and "error" in event:
            error = event["error"]
    return Outcome(status, events, time.monotonic(), error)


@contextmanager
def in_background(count: int) -> Iterator[Callable[..., Future[Outcome]]]:
    """``submit(server, stream, prompt, **fields)`` sends requests from threads."""
    with ThreadPoolExecutor(count) as pool:

        def submit(*args: Any, **fields: Any) -> Future[Outcome]:
            return pool.submit(request, *args, **fields)

        yield submit


def check_error(response: httpx.Response, *statuses: int, param: str | None = None) -> dict[str, Any]:
    """The response is an error object of the contract's shape; returns its inside."""
    assert response.status_code in statuses, (response.status_code, response.text[:300])
    return check_error_body(response.json(), param=param)


def check_error_body(body: Any, *, param: str | None = None) -> dict[str, Any]:
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 600, "an error message is one sentence, not what was sent"
    assert not re.search(r"Traceback|pydantic|File \"|0x[0-9a-f]{6}", error["message"]), error
    assert error["code"] is None or isinstance(error["code"], str)
    if param is not None:
        assert error["param"] is not None, error
        assert error["param"].startswith(param), error
    return error

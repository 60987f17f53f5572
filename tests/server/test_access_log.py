from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.types import BLEND, Delta, GenerationRequest
from server.access import JsonFormatter
from tests.live import announced_address
from tests.packaging.sources import ROOT
from tests.server.commands.servers import server_of_standins
from tests.server.conftest import Build
from tests.server.fakes import deltas_of, letters, writes
from tests.waiting import GENEROUS_SECONDS

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Gives the fields of the lines that were logged."""
    caplog.set_level(logging.INFO, "collm.access")
    return lambda: [record.__dict__["fields"] for record in caplog.records if record.name == "collm.access"]


async def test_an_answer_is_logged_with_its_tokens(build: Build, lines: Lines) -> None:
    house = await build(writes(letters("abcd")))
    await house.http.post(
        "/v1/completions",
        json={"model": "collm-demo", "prompt": "Hello", "max_tokens": 4},
        headers={"X-Request-Id": "mine-1"},
    )
    [line] = lines()
    seconds = line.pop("seconds")
    assert isinstance(seconds, float)
    prompt = len(house.engine.seen[0].prompt)
    assert line == {
        "request_id": "mine-1", "client": line["client"], "method": "POST", "path": "/v1/completions", "status": 200,
        "model": "collm-demo", "prompt_tokens": prompt, "completion_tokens": 4, "expert_tokens": 2,
        "queue_seconds": 0.0,
    }  # fmt: skip


async def test_what_a_blend_wrote_is_logged_as_that(build: Build, lines: Lines) -> None:
    house = await build(
        lambda request: [Delta(request.request_id, letters("ab"), [BLEND, 0], [None, None], finish_reason="stop")]
    )
    await house.complete(max_tokens=4)
    [line] = lines()
    assert (line["completion_tokens"], line["expert_tokens"], line["blended_tokens"]) == (2, 0, 1)


async def test_a_stream_is_logged_at_its_end(build: Build, lines: Lines) -> None:
    house = await build(writes(letters("abcd")))
    await house.complete(stream=True, max_tokens=4)
    [line] = lines()
    assert (line["status"], line["completion_tokens"]) == (200, 4)


async def test_a_stream_that_breaks_says_so(build: Build, lines: Lines) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        failed = Delta(request.request_id)
        failed.finish_reason, failed.error = "error", "The lane fell over."
        return [*deltas_of(request, letters("ab"))[:1], failed]

    house = await build(script)
    await house.complete(stream=True)
    [line] = lines()
    assert (line["status"], line["completion_tokens"]) == (200, 1)
    assert line["error"]


async def test_what_is_refused_is_logged_and_probes_are_not(build: Build, lines: Lines) -> None:
    house = await build()
    await house.http.get("/health")
    await house.complete(model="nobody")
    await house.http.get("/no%0Asuch%1B%5B31mthing")
    assert [(line["path"], line["status"]) for line in lines()] == [
        ("/v1/completions", 404), ("/no%0Asuch%1B%5B31mthing", 404),
    ]  # fmt: skip
    assert all("completion_tokens" not in line for line in lines())


async def test_it_can_be_switched_off(build: Build, lines: Lines) -> None:
    house = await build(server={"access_log": False})
    await house.complete()
    assert lines() == []


def test_json() -> None:
    record = logging.LogRecord("x.y", logging.ERROR, __file__, 1, "said %s\n\u2028", ("that",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": json.loads(line)["time"], "level": "ERROR", "logger": "x.y", "message": "said that\n\u2028",
    }  # fmt: skip
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    assert "ValueError: why" in json.loads(JsonFormatter().format(record))["exception"]


def test_a_server_logs_json(tmp_path: Path) -> None:
    config, log = server_of_standins(tmp_path), tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "--config", str(config), "--server.log_format", "json",
             "--server.access_log"],
            cwd=ROOT, stdout=out, stderr=out,
        )  # fmt: skip
        try:
            address = announced_address(process, log, GENEROUS_SECONDS)
            body = {"model": "collm-standin", "prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
            assert httpx.post(f"{address}/v1/completions", json=body, timeout=GENEROUS_SECONDS).status_code == 200
        finally:
            process.terminate()
            process.wait(GENEROUS_SECONDS)
    logged = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    [answer] = [line for line in logged if line["logger"] == "collm.access"]
    assert answer["completion_tokens"] == 3

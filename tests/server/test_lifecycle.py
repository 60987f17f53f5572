"""The whole process: start, drain, second signal, engine death. The engine is real, its lanes are stand-ins."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.fakes import byte_level_tokenizer, check_error, events
from tests.waiting import GENEROUS_SECONDS

ROOT = Path(__file__).parents[2]
LONG = {"model": "collm-demo", "prompt": "Hello", "max_tokens": 100_000, "ignore_eos": True}


class Process:
    """A started server."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""

    async def said(self, pattern: str) -> str:
        """Read the output until a line matches; returns the match's first group, or the line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(GENEROUS_SECONDS):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line.rstrip())
                if match := re.search(pattern, line):
                    return match[1] if match.groups() else match[0]
        raise AssertionError(f"never said {pattern!r}: {self.lines}")

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), GENEROUS_SECONDS)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=GENEROUS_SECONDS)

    def children(self) -> list[int]:
        pid = self.process.pid
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:  # it has ended meanwhile
            return []


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    started: list[Process] = []

    async def launch(
        *argv: str, backend: str = "bench.standin", ready: bool = True, step_seconds: float | None = None
    ) -> Process:
        step = "" if step_seconds is None else f", step_seconds = {step_seconds}"
        lane = f'vllm = {{ vocab_size = 330, max_model_len = 200000{step} }}\nbackend = "bench.standin"\n'
        config = tmp_path / "pair.toml"
        lane = lane.replace('"bench.standin"', f'"{backend}"')
        config.write_text(
            f'served_model_name = "collm-demo"\ntokenizer = "{tmp_path}"\n[base]\nmodel = "base"\n{lane}'
            f'[[experts]]\nname = "codes"\nmodel = "expert"\n{lane}'
            "[server]\nport = 0\naccess_log = false\n"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server", "--config", str(config), *argv,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip
        server = Process(process)
        started.append(server)
        if ready:
            server.url = await server.said(r"ready at (http://\S+)")
        return server

    yield launch
    for server in started:
        for pid in server.children() if server.process.returncode is None else []:
            os.kill(pid, signal.SIGKILL)
        if server.process.returncode is None:
            server.process.kill()
        output, _ = await server.process.communicate()
        # Shown by pytest where the test has failed.
        print("\n".join(server.lines), output.decode(), sep="\n")


async def begin_stream(client: httpx.AsyncClient, **fields: Any) -> tuple[contextlib.AsyncExitStack, httpx.Response]:
    stack = contextlib.AsyncExitStack()
    request = client.stream("POST", "/v1/completions", json={**LONG, "stream": True, **fields})
    response = await stack.enter_async_context(request)
    assert response.status_code == 200
    return stack, response


async def in_flight(client: httpx.AsyncClient, count: int) -> None:
    """Returns when so many generations of the joint model have been admitted."""
    gauges = re.compile(r'^collm_requests_(?:running|waiting){model_name="collm-demo"} (\S+)$', re.M)
    async with asyncio.timeout(30):
        while sum(map(float, gauges.findall((await client.get("/metrics")).text))) != count:
            await asyncio.sleep(0.02)


async def gone(pid: int) -> None:
    """Returns when a process has ended."""
    async with asyncio.timeout(20):
        while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            await asyncio.sleep(0.02)


async def test_it_says_how_to_try_it_and_drains_on_sigterm(start: Start) -> None:
    # Slow enough to be in flight still when the server has been told to end and been asked twice more.
    server = await start(step_seconds=0.002)
    example = await server.said("try: (curl .*)")
    assert server.url in example
    answer = subprocess.run(example, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
    assert '"text_completion"' in answer
    (engine,) = server.children()
    async with server.client() as client:
        stack, response = await begin_stream(client, max_tokens=1_500)
        async with stack:
            lines = response.aiter_text()
            first = await anext(lines)
            server.process.send_signal(signal.SIGTERM)
            await server.said("draining")
            check_error(await client.get("/ready"), 503)
            late = await client.post("/v1/completions", json=LONG)
            check_error(late, 503)
            assert late.headers["retry-after"]
            whole = first + "".join([text async for text in lines])
    *chunks, done = events(whole)
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert await server.ended() == 0
    await gone(engine)


async def test_a_second_signal_ends_at_once(start: Start) -> None:
    server = await start()
    (engine,) = server.children()
    async with server.client() as client:
        stack, response = await begin_stream(client)
        async with stack:
            server.process.send_signal(signal.SIGTERM)
            await server.said("draining")
            server.process.send_signal(signal.SIGTERM)
            assert await server.ended() == 143
            texts: list[str] = []
            with contextlib.suppress(httpx.HTTPError):
                async for text in response.aiter_text():
                    texts.append(text)
    # Cut short, and seen to be: by an error event or by a broken connection.
    assert texts
    assert "[DONE]" not in "".join(texts)
    await gone(engine)


async def test_the_death_of_the_engine_is_answered_and_ends_the_process(start: Start) -> None:
    server = await start()
    (engine,) = server.children()
    async with server.client() as client:
        stack, response = await begin_stream(client)
        async with stack:
            lines = response.aiter_text()
            first = await anext(lines)
            whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
            await in_flight(client, 2)
            os.kill(engine, signal.SIGKILL)
            rest = first + "".join([text async for text in lines])
            check_error(await whole, 500)
    assert events(rest)[-1]["error"]["code"] == "engine_dead"
    await server.said("error: the engine died")
    assert await server.ended() == 1


async def test_or_another_engine_takes_its_place(start: Start) -> None:
    server = await start("--server.on_engine_death", "restart")
    (engine,) = server.children()
    os.kill(engine, signal.SIGKILL)
    assert await server.said(r"ready at (http://\S+)") == server.url
    async with server.client() as client:
        answer = await client.post("/v1/completions", json={**LONG, "max_tokens": 3})
        assert answer.status_code == 200
        assert (await client.get("/health")).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert await server.ended() == 0


async def test_an_engine_that_refuses_is_one_line(start: Start) -> None:
    server = await start(backend="vllm", ready=False)
    assert await server.ended() == 1
    assert server.process.stdout is not None
    output = (await server.process.stdout.read()).decode()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "Traceback" not in output


async def test_a_signal_while_loading_ends_it(start: Start) -> None:
    server = await start(backend="vllm", ready=False)
    await server.said("Started server process|loading")
    server.process.send_signal(signal.SIGTERM)
    assert await server.ended() == 0

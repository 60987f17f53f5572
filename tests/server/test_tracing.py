"""Traces as a collector receives them: the exporter is real, and so is the server where it matters."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from engine.types import Delta, GenerationRequest
from server.settings import ConfigFileError
from server.trace.timeline import MAX_STRETCHES
from tests.server import test_lifecycle
from tests.server.collector import Collector, Span
from tests.server.conftest import Build, House
from tests.server.fakes import check_error, deltas_of, events, letters, settings, waits_forever
from tests.server.test_lifecycle import ROOT, Start
from tests.waiting import until

start = test_lifecycle.start

TRACE = "0af7651916cd43dd8448eb211c80319c"  # pragma: allowlist secret
PARENT = "b7ad6b7169203331"  # pragma: allowlist secret
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=abc", "X-Request-Id": "req-1"}
SECRET = "zebra"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.paths.add(self.path)
            found.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        found.url = f"http://127.0.0.1:{http.server_port}"
        yield found
        http.shutdown()
        thread.join()


@dataclass
class Traced:
    house: House
    collector: Collector

    async def flushed(self) -> list[Span]:
        traces = self.house.traces
        assert traces is not None
        await traces.shutdown()
        return await self.collector.requests(0)


@pytest.fixture
async def traced(build: Build, collector: Collector) -> AsyncIterator[Any]:
    made: list[Traced] = []

    async def make(script: Any = None, **parts: Any) -> Traced:
        server = {"otlp_endpoint": collector.url, **parts.pop("server", {})}
        made.append(Traced(await build(script, server=server, **parts), collector))
        return made[-1]

    yield make
    for one in made:
        assert one.house.traces is not None
        await one.house.traces.shutdown()


def timed(tokens: list[int], sources: list[int], **how: Any) -> Any:
    """A script with a timeline: an expert wait for each token that the base did not write."""

    def script(request: GenerationRequest) -> Iterator[Delta]:
        timeline = [time.monotonic()]
        for delta in deltas_of(request, tokens, sources=sources, **how):
            for source in delta.sources:
                if source:
                    timeline += [time.monotonic(), time.monotonic()]
            if request.timeline and delta.finish_reason is not None:
                delta.timeline = timeline
            yield delta

    return script


def check_order(collector: Collector, request: Span, choice: Span) -> list[Span]:
    """The stretches of a choice: without gaps, in order, inside of everything above them."""
    inside = collector.below(choice)
    assert [span.name for span in inside][:2] == ["queue", "base"]
    for first, second in itertools.pairwise(inside):
        assert first.end == second.start
    for first, second in itertools.pairwise(inside[1:]):
        assert {first.name, second.name} == {"base", "expert wait"}
    for span in (choice, *inside):
        assert request.start <= choice.start <= span.start <= span.end <= choice.end <= request.end
        assert span.proto.trace_id == request.proto.trace_id
    return inside


# -- the whole server ---------------------------------------------------------------------------------------------


async def test_a_request_continues_the_clients_trace(start: Start, collector: Collector) -> None:
    server = await start("--server.otlp_endpoint", collector.url)
    body = {
        "model": "collm-demo", "prompt": f"Hello {SECRET}", "max_tokens": 40, "n": 2, "ignore_eos": True,
        "collaboration": {"policy": "random", "rate": 0.5, "report": True},
    }  # fmt: skip
    async with server.client() as client:
        before = time.time_ns()
        answer = (await client.post("/v1/completions", json=body, headers=SAMPLED)).json()
        after = time.time_ns()
        [request] = await collector.requests(1)
    assert collector.paths == {"/v1/traces"}
    assert request.resource["service.name"] == "collm"
    assert request.name == "POST /v1/completions"
    assert request.proto.trace_id.hex() == TRACE
    assert request.parent == PARENT
    assert request.proto.trace_state == "vendor=abc"
    assert before <= request.start <= request.end <= after + 1_000_000_000
    assert not request.failed
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "collm.request_id": "req-1",
    }
    generation = collector.generation(request)
    assert generation.name == "text_completion collm-demo"
    details = answer["usage"]["completion_tokens_details"]
    assert {name: value for name, value in generation.attributes.items() if name != "collm.deferral_rate"} == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "collm",
        "gen_ai.request.model": "collm-demo",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 80,
        "collm.choices": 2,
        "collm.policy": "random",
        "collm.base_tokens": details["base_tokens"],
        "collm.expert_tokens": details["expert_tokens"],
        "collm.finish_reason": "length",
    }
    assert generation.attributes["collm.deferral_rate"] == details["expert_tokens"] / 80
    choices = collector.below(generation)
    assert sorted(choice.attributes["collm.choice.index"] for choice in choices) == [0, 1]
    for choice in choices:
        assert choice.name == "choice"
        sources = answer["choices"][choice.attributes["collm.choice.index"]]["collaboration"]["sources"]
        inside = check_order(collector, request, choice)
        waits = [span for span in inside if span.name == "expert wait"]
        # A run of expert tokens is one span.
        runs = [(who, len(list(run))) for who, run in itertools.groupby(sources)]
        assert [span.attributes["collm.tokens"] for span in waits] == [n for who, n in runs if who == "codes"] != []
        assert sources.count("codes") == choice.attributes["collm.expert_tokens"]
        assert all(span.attributes["collm.expert"] == "codes" for span in waits)
        written = sum(span.attributes["collm.tokens"] for span in inside if span.name == "base")
        assert written == sources.count("base")
        # The last token is the end of the last step.
        assert inside[-1].name == ("base" if sources[-1] == "base" else "expert wait")
        assert choice.attributes["collm.spans.merged"] == 2 * (sources.count("codes") - len(waits))
        assert choice.attributes["collm.expert_wait.seconds"] > 0
    assert SECRET.encode() not in collector.raw
    server.process.send_signal(signal.SIGTERM)
    assert await server.ended() == 0


async def test_a_stream_and_the_flush_at_the_end(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    server = await start()
    body = {
        "model": "collm-demo", "prompt": "Hello", "max_tokens": 30, "stream": True, "ignore_eos": True,
        "collaboration": {"policy": "always"},
    }  # fmt: skip
    async with server.client() as client:
        answer = await client.post("/v1/completions", json=body)
        assert events(answer.text)[-1] == "[DONE]"
    assert not collector.spans
    server.process.send_signal(signal.SIGTERM)
    assert await server.ended() == 0
    [request] = await collector.requests(1)
    assert request.resource["service.name"] == "mine"
    assert request.parent == ""
    generation = collector.generation(request)
    assert generation.attributes["gen_ai.request.stream"] is True
    assert generation.attributes["collm.deferral_rate"] == 1.0
    assert request.attributes["collm.request_id"] == answer.headers["x-request-id"]
    [choice] = collector.below(generation)
    inside = check_order(collector, request, choice)
    assert [span.name for span in inside] == ["queue", "base", "expert wait"]
    assert inside[-1].attributes["collm.tokens"] == 30


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_dies(start: Start, collector: Collector, stream: bool) -> None:
    server = await start("--server.otlp_endpoint", collector.url)
    (engine,) = server.children()
    async with server.client() as client:
        body = {**test_lifecycle.LONG, "prompt": SECRET, "stream": stream}
        answering = asyncio.create_task(client.post("/v1/completions", json=body, headers=SAMPLED))
        metrics = ""
        while "collm_requests_running{" not in metrics or 'running{model_name="collm-demo"} 0.0' in metrics:
            metrics = (await client.get("/metrics")).text
        os.kill(engine, signal.SIGKILL)
        answer = await answering
    assert "engine" in answer.text
    assert await server.ended() == 1
    [request] = await collector.requests(1)
    generation = collector.generation(request)
    [choice] = collector.below(generation)
    assert request.attributes["http.response.status_code"] == (200 if stream else 500)
    for span in (request, generation, choice):
        assert span.failed
        assert span.attributes["error.type"] == "engine_dead"
    for span in (generation, choice):
        assert span.attributes["collm.finish_reason"] == "error"
    assert choice.attributes["collm.timeline"] is False
    assert SECRET.encode() not in collector.raw


@pytest.mark.parametrize("listening", [False, True])
async def test_a_dead_collector_costs_a_warning(start: Start, listening: bool) -> None:
    """Nobody listens, or somebody who never answers. Neither holds up an answer or the server's end: waiting for either
    would time out.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if listening:
            sock.listen()
        server = await start("--server.otlp_endpoint", f"http://127.0.0.1:{sock.getsockname()[1]}")
        started = time.monotonic()
        body = {"model": "collm-demo", "prompt": "Hello", "max_tokens": 8}
        async with server.client() as client:
            for _ in range(30):
                assert (await client.post("/v1/completions", json=body)).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert await server.ended() == 0
        assert server.process.stdout is not None
        output = (await server.process.stdout.read()).decode()
        assert "Traceback" not in output
        # One warning a minute.
        assert output.count("opentelemetry") <= 2 + (time.monotonic() - started) // 60, output
        assert "opentelemetry" in output or "could not be sent" in output


def test_off_by_default_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys, server.lifecycle, server.cli; from tests.server.fakes import *;"
        "from server.service import Service; from server.text.tokenizer import TextTokenizer;"
        "from server.app import create_app;"
        "service = Service(settings(), TextTokenizer(byte_level_tokenizer(), {}));"
        "from server.trace.start import start_tracing;"
        "traces = start_tracing(service.settings.server, service.models);"
        "create_app(service, traces);"
        "late = ('opentelemetry', 'grpc', 'server.trace.spans', 'server.trace.middleware', 'server.trace.exporter');"
        "print(traces, [m for m in sys.modules if m.startswith(late)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "None []\n"


# -- in this process ----------------------------------------------------------------------------------------------


async def test_untraced_requests_ask_for_no_timeline(traced: Any, build: Build, monkeypatch: Any) -> None:
    house = await build()
    assert (await house.complete()).status_code == 200
    on = await traced()
    unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    for headers in (unsampled, SAMPLED):
        await on.house.http.post("/v1/completions", json={"model": "collm-demo", "prompt": "Hi"}, headers=headers)
    assert [request.timeline for request in (*house.engine.seen, *on.house.engine.seen)] == [False, False, True]
    assert len(await on.flushed()) == 1


async def test_chat_and_members_alone(traced: Any) -> None:
    on = await traced(timed(letters("abcd"), [1, 1, 1, 1]))
    assert (await on.house.chat(model="collm-demo/codes", temperature=0)).status_code == 200
    [request] = await on.flushed()
    assert request.name == "POST /v1/chat/completions"
    generation = on.collector.generation(request)
    assert generation.name == "chat collm-demo/codes"
    assert generation.attributes["gen_ai.operation.name"] == "chat"
    assert generation.attributes["gen_ai.request.model"] == "collm-demo/codes"
    assert not {"collm.policy", "collm.threshold", "collm.deferral_rate"} & set(generation.attributes)


async def test_policy_and_threshold_of_the_gate_or_the_request(traced: Any) -> None:
    on = await traced()
    await on.house.complete()
    await on.house.complete(collaboration={"threshold": 0.25})
    await on.house.complete(collaboration={"policy": "sample"})
    requests = sorted(await on.flushed(), key=lambda span: span.start)
    requests = [on.collector.generation(request) for request in requests]
    found = [(span.attributes["collm.policy"], span.attributes.get("collm.threshold")) for span in requests]
    assert found == [("threshold", 0.5), ("threshold", 0.25), ("sample", None)]


async def test_a_long_answer_keeps_its_trace(traced: Any) -> None:
    """Writers that alternate 200 times: neighbours are merged, and the last span is the end of the answer."""
    on = await traced(timed(letters("ab") * 100, [0, 1] * 100))
    await on.house.complete(max_tokens=200)
    [request] = await on.flushed()
    [choice] = on.collector.below(on.collector.generation(request))
    inside = on.collector.below(choice)
    assert 64 < len(inside) <= MAX_STRETCHES
    assert all(first.end == second.start for first, second in itertools.pairwise(inside))
    assert sum(span.attributes.get("collm.tokens", 0) for span in inside) == 200
    assert choice.attributes["collm.spans.merged"] == 201 - len(inside)
    assert choice.attributes["collm.expert_tokens"] == 100


async def test_a_stop_string_leaves_no_timeline(traced: Any) -> None:
    on = await traced(timed(letters("abcdef"), [0] * 6))
    await on.house.complete(stop="cd")
    [request] = await on.flushed()
    generation = on.collector.generation(request)
    [choice] = on.collector.below(generation)
    assert choice.attributes["collm.finish_reason"] == generation.attributes["collm.finish_reason"] == "stop"
    assert choice.attributes["collm.timeline"] is False
    assert on.collector.below(choice) == []


async def test_failures_by_whose_fault_they_are(traced: Any) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        if request.sampling.max_tokens == 1:
            return [Delta(request.request_id, error=SECRET, finish_reason="error", refused=True)]
        if request.sampling.max_tokens == 2:
            raise ZeroDivisionError(SECRET)
        return [
            Delta(request.request_id, [66], [0], [0.1]),
            Delta(request.request_id, error=SECRET, finish_reason="error"),
        ]

    on = await traced(script, server={"api_keys": ["key"]})
    http = on.house.http
    check_error(await on.house.complete(), 401)
    http.headers["Authorization"] = "Bearer key"
    check_error(await on.house.complete(model=SECRET), 404)
    check_error(await on.house.complete(max_tokens=1), 400)
    check_error(await on.house.complete(max_tokens=2), 500)
    check_error(await on.house.complete(max_tokens=3), 500)
    on.house.service.drain()
    check_error(await on.house.complete(), 503)
    requests = sorted(await on.flushed(), key=lambda span: span.start)
    found = [
        (span.attributes.get("http.response.status_code"), span.attributes["error.type"], span.failed)
        for span in requests
    ]
    assert found == [
        (401, "401", False),
        (404, "404", False),
        (400, "400", False),
        (None, "ZeroDivisionError", True),
        (500, "request_failed", True),
        (503, "503", True),
    ]
    assert SECRET.encode() not in on.collector.raw


async def test_a_client_that_hangs_up(traced: Any) -> None:
    on = await traced(waits_forever)
    asked = asyncio.create_task(on.house.complete())
    await until(lambda: bool(on.house.engine.seen))
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    [request] = await on.flushed()
    generation = on.collector.generation(request)
    assert generation.attributes["collm.finish_reason"] == "aborted"
    assert not request.failed
    [choice] = on.collector.below(generation)
    assert choice.attributes["collm.finish_reason"] == "aborted"


@pytest.mark.parametrize(
    "traceparent", ["", "garbage", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{PARENT}"]
)
async def test_a_malformed_traceparent_begins_a_trace(traced: Any, traceparent: str) -> None:
    on = await traced()
    on.house.http.headers["traceparent"] = traceparent
    assert (await on.house.complete()).status_code == 200
    [request] = await on.flushed()
    assert request.parent == ""
    assert request.proto.trace_id.hex() != TRACE


async def test_only_generation_is_traced(traced: Any) -> None:
    on = await traced()
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/completions"):
        await on.house.http.get(path)
    await on.house.http.post("/tokenize", json={"model": "collm-demo", "prompt": "Hi"})
    assert await on.flushed() == []


async def test_grpc(build: Build) -> None:
    collector = Collector()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
            collector.take(request.SerializeToString())
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        house = await build(server={"otlp_endpoint": f"http://127.0.0.1:{port}", "otlp_protocol": "grpc"})
        await house.complete()
        assert house.traces is not None
        await house.traces.shutdown()
        [request] = await collector.requests(1)
        assert collector.generation(request).attributes["gen_ai.request.model"] == "collm-demo"
    finally:
        server.stop(None).wait()


async def test_settings_of_the_environment(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert (await build()).traces is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ConfigFileError, match="http/json"):
        await build()
    with pytest.raises(ValueError, match="otlp_endpoint"):
        settings(server={"otlp_endpoint": "collector:4318"})

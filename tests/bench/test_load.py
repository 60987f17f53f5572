"""The load generator, its HTTP client, and the forced deferrals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from bench.contenders.per_token_http import defers
from bench.errors import BenchError
from bench.http_client import HttpError, Pool
from bench.load import drive
from bench.services import stream_completion
from bench.shapes import Pair
from bench.workload import Cell, Job, make_jobs
from engine.lanes.interface import Sample
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.strategies.deferral.policies import POLICIES, Position
from engine.types import BASE, Collaboration, GenerationRequest, SamplingSpec

JOBS = [Job(str(number), [1, 2], 4, 0.5, number) for number in range(10)]


class Fake:
    name = "fake"
    slow = False
    services = ()

    def __init__(self, tokens: int = 4) -> None:
        self.tokens = tokens
        self.running = self.most = 0
        self.seen: list[str] = []

    async def run(self, job: Job, stamp: Callable[[], None]) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        self.seen.append(job.name)
        for _ in range(self.tokens):
            await asyncio.sleep(0)
            stamp()
        self.running -= 1
        return self.tokens


async def test_the_loop_is_closed() -> None:
    fake = Fake()
    outcome = await drive(fake, JOBS, 3)  # type: ignore[arg-type]
    assert fake.most == 3
    assert fake.seen == [job.name for job in JOBS]
    assert (outcome.tokens, outcome.arrivals) == (40, 40)
    assert len(outcome.first) == 10
    assert len(outcome.gaps) == 30
    assert outcome.tokens_per_second == pytest.approx(40 / outcome.seconds)


async def test_a_short_answer_fails_the_bench() -> None:
    with pytest.raises(BenchError, match="3 tokens instead of 4"):
        await drive(Fake(tokens=3), JOBS, 3)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def http_server(answer: bytes) -> AsyncIterator[Pool]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Pool("127.0.0.1", server.sockets[0].getsockname()[1]) as pool:
        yield pool


def chunked(*events: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


EVENT = b'data: {"choices":[{"index":0,"text":"a"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


async def streamed(answer: bytes) -> tuple[int, int]:
    stamps: list[None] = []
    async with http_server(answer) as pool:
        # Twice: the connection is kept.
        await stream_completion(pool, {}, lambda: None)
        tokens = await stream_completion(pool, {}, lambda: stamps.append(None))
    return tokens, len(stamps)


async def test_a_stream_is_counted_and_checked() -> None:
    assert await streamed(chunked(EVENT, EVENT, USAGE + DONE)) == (2, 2)
    assert await streamed(chunked(EVENT, EVENT, USAGE, DONE)) == (2, 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chunked(EVENT, USAGE), "stream ended with"),
        (chunked(EVENT, DONE), "no usage"),
        (chunked(EVENT, b'data: {"error":{}}\n\n', USAGE, DONE), "stream ended with"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "status 500"),
    ],
)
async def test_a_broken_stream_fails(answer: bytes, message: str) -> None:
    with pytest.raises(HttpError, match=message):
        await asyncio.wait_for(streamed(answer), 10)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_forced_deferrals_are_the_engines_own(rate: float) -> None:
    job = Job("0", [3, 4, 5], 40, rate, 12345678901234567890 % (1 << 62))
    scheduler = Scheduler(
        lanes=2, max_num_seqs=1, max_model_len=100, eos_token_ids=[0], strategy=Strategies(2, has_gate=False)
    )
    sampling = SamplingSpec(temperature=0.0, seed=job.seed, ignore_eos=True, max_tokens=job.max_tokens)
    scheduler.add(GenerationRequest("0", job.prompt, sampling, Collaboration(policy="random", rate=rate)))
    sources: list[int] = []
    while scheduler.running or scheduler.waiting:
        for lane in range(2):
            scheduler.plan(lane)
            scheduler.land(lane, [Sample("0", len(job.prompt) + len(sources), 7)])
            for delta in scheduler.take_deltas():
                sources += delta.sources
    assert sources == [1 if defers(job, 3 + position) else BASE for position in range(40)]
    assert POLICIES["random"].decide(Position(None, [(1, 1.0)], 0.5, 1.0, 0.5)) == 1


def test_the_gates_decisions_cannot_be_foretold() -> None:
    with pytest.raises(ValueError, match="gate"):
        defers(Job("0", [1], 1, "gate", 1), 1)


def test_jobs_are_the_same_for_everybody_and_new_in_every_round(tiny: Pair) -> None:
    cell = Cell(8, 0.3)
    first = make_jobs(tiny, cell, 5, 16, seed=1, round_number=0)
    assert make_jobs(tiny, cell, 8, 16, seed=1, round_number=0)[:5] == first
    others = [
        make_jobs(tiny, cell, 5, 16, seed=1, round_number=1),
        make_jobs(tiny, cell, 5, 16, seed=2, round_number=0),
    ]
    assert all(jobs[0].prompt != first[0].prompt for jobs in others)
    assert {len(job.prompt) for job in first} == {32}
    assert {len(job.prompt) for job in make_jobs(tiny, Cell(8, 0.3, "long"), 5, 16, seed=1, round_number=0)} == {512}

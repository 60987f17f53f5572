"""The client on an event loop, with a real engine process and stand-in lanes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio

from engine.client import EngineClient
from engine.errors import EngineDeadError, EngineStartupError, RequestError
from engine.stats import EngineStats
from engine.types import Delta, GenerationRequest, SamplingSpec
from tests.engine.builders import mixed_requests, request, standin_config
from tests.engine.oracle import Ledger, Pair, check

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
PAIR = Pair(experts=2, max_num_seqs=16)
LONG = {"max_tokens": 1000, "experts": (1,), "policy": "random", "rate": 0.5}
"""A request that is not at its end when a test does something to it."""
SLOW = Pair(max_model_len=1000, experts=1)
T = TypeVar("T")


async def soon(coroutine: Coroutine[Any, Any, T], seconds: float = 60.0) -> T:
    """What must not hang. The bound is generous: it says nothing about speed."""
    return await asyncio.wait_for(coroutine, seconds)


async def rest(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


async def collect(client: EngineClient, one: GenerationRequest) -> list[Delta]:
    return await rest(client.generate(one))


def watch(client: EngineClient, condition: Callable[[list[Delta], EngineStats], bool]) -> asyncio.Event:
    """An event that is set by the first batch from now on that fulfils the condition."""
    seen = asyncio.Event()

    def look(deltas: list[Delta], stats: EngineStats) -> None:
        if condition(deltas, stats):
            seen.set()

    client.on_batch(look)
    return seen


def any_finished(deltas: list[Delta], _: EngineStats) -> bool:
    return any(delta.finish_reason for delta in deltas)


def nothing_held(_: list[Delta], stats: EngineStats) -> bool:
    return stats.running == stats.waiting == 0 and all(lane.requests == 0 for lane in stats.lanes)


@asynccontextmanager
async def running(pair: Pair = PAIR, **options: Any) -> AsyncIterator[EngineClient]:
    client = await soon(EngineClient.start(standin_config(pair, **options)))
    try:
        yield client
    finally:
        await soon(client.shutdown())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    """Small lanes: chunked prompts, rows that are dropped."""
    async with running(token_budget=48, kv_tokens=300) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow() -> AsyncIterator[EngineClient]:
    """Each step takes a while, so that a long request is still running when a test acts."""
    async with running(SLOW, step_seconds=0.005) as client:
        yield client


# -- streams --------------------------------------------------------------------------------------------------


async def test_streams_equal_brute_force(client: EngineClient) -> None:
    requests = mixed_requests(60, PAIR, seed=2)
    streams = await soon(asyncio.gather(*(collect(client, one) for one in requests)))
    for one, deltas in zip(requests, streams, strict=True):
        assert all(delta.request_id == one.request_id for delta in deltas)
        check(Ledger(deltas).got[one.request_id], one, PAIR)


async def test_deltas_come_while_it_is_written(slow: EngineClient) -> None:
    one = request("streamed", max_tokens=20)
    deltas = await soon(collect(slow, one))
    assert len(deltas) > 1
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    check(Ledger(deltas).got["streamed"], one, SLOW)


async def test_a_slow_reader_gets_merged_deltas(slow: EngineClient) -> None:
    one = request("read slowly", max_tokens=50, logprobs=1, prompt_logprobs=1)
    finished = watch(slow, any_finished)
    stream = slow.generate(one)
    first = await soon(anext(stream))
    assert first.finish_reason is None
    await soon(finished.wait())
    (second,) = await soon(rest(stream))
    check(Ledger([first, second]).got[one.request_id], one, SLOW)


async def test_stats_add_up(client: EngineClient) -> None:
    waits: list[float] = []
    before = client.stats.lanes[1].steps
    client.on_batch(lambda _, stats: waits.extend(stats.expert_waits))
    at_rest = watch(client, nothing_held)
    await soon(collect(client, request("counted", policy="always", experts=(1,))))
    await soon(at_rest.wait())
    assert len(waits) == 4
    assert client.stats.lanes[1].steps - before == 4
    assert client.stats.integrity_errors == 0


# -- the end of a request -------------------------------------------------------------------------------------


async def test_closing_early_aborts(slow: EngineClient) -> None:
    stream = slow.generate(request("closed", **LONG))
    while 1 not in (await soon(anext(stream))).sources:
        pass
    freed = watch(slow, nothing_held)
    await soon(stream.aclose())
    await soon(freed.wait())
    assert slow.stats.integrity_errors == 0


async def test_cancelling_the_reader_aborts(slow: EngineClient) -> None:
    reading = asyncio.Event()

    async def read() -> None:
        async for _ in slow.generate(request("cancelled", **LONG)):
            reading.set()

    reader = asyncio.create_task(read())
    await soon(reading.wait())
    freed = watch(slow, nothing_held)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await soon(freed.wait())
    assert slow.stats.integrity_errors == 0


async def test_abort_ends_the_stream(slow: EngineClient) -> None:
    one = request("aborted", **LONG)
    ledger = Ledger()
    async for delta in slow.generate(one):
        if not ledger.got:
            await slow.abort(["nobody", "aborted"])
        ledger.take([delta])
    written = ledger.got["aborted"]
    assert written.finish_reason == "aborted"
    check(written, one, SLOW)
    # Nothing holds on to the id.
    again = request("aborted")
    check(Ledger(await soon(collect(slow, again))).got["aborted"], again, SLOW)


async def test_an_id_can_be_used_again_after_closing_early(slow: EngineClient) -> None:
    """Nothing that the engine still says of the first one is taken for the second one's."""
    stream = slow.generate(request("reused", **LONG))
    await soon(anext(stream))
    await soon(stream.aclose())
    second = request("reused", [9, 8, 7])
    deltas = await soon(collect(slow, second))
    check(Ledger(deltas).got["reused"], second, SLOW)


# -- refusals -------------------------------------------------------------------------------------------------


async def test_an_id_in_use_is_refused(slow: EngineClient) -> None:
    async with aclosing(slow.generate(request("twice", **LONG))) as stream:
        await soon(anext(stream))
        with pytest.raises(RequestError, match="'twice' is already in use"):
            await soon(collect(slow, request("twice")))
        assert (await soon(anext(stream))).finish_reason is None, "the first one goes on"


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([1] * 64, "prompt has 64 tokens, the context is 64"),
        ([1, 16], "prompt has a token id outside [0, 16)"),
        ([-1, 1], "prompt has a token id outside [0, 16)"),
        ([1 << 40], "prompt has a token id outside [0, 16)"),
        ([], "prompt is empty"),
    ],
)
async def test_what_the_engine_refuses_is_its_last_delta(client: EngineClient, prompt: list[int], problem: str) -> None:
    (delta,) = await soon(collect(client, request("refused", prompt)))
    assert (delta.tokens, delta.finish_reason, delta.error) == ([], "error", problem)


async def test_a_number_too_large_for_the_wire_is_refused(client: EngineClient) -> None:
    with pytest.raises(RequestError):
        await soon(collect(client, request("seed", seed=1 << 70)))


async def test_a_value_of_the_wrong_type_is_refused(client: EngineClient) -> None:
    sampling = SamplingSpec(max_tokens="16")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="max_tokens"):
        await soon(collect(client, GenerationRequest("wrong", [1], sampling)))


async def test_a_reader_slower_than_the_step_timeout_is_no_dead_engine() -> None:
    """A finished engine says nothing; what it has delivered may lie unread for as long as the reader likes."""
    async with running(step_timeout_seconds=0.2) as client, aclosing(client.generate(request(max_tokens=20))) as stream:
        first = await soon(anext(stream))
        while client.stats.running:
            await asyncio.sleep(0.01)
        # The client looks every (0.2 + 2) / 4 seconds.
        await asyncio.sleep(4)
        assert client.alive
        assert sum(len(delta.tokens) for delta in [first, *await soon(rest(stream))]) == 20


async def test_a_callback_that_fails_stops_nobody_else() -> None:
    async with running() as client:
        client.on_batch(lambda *_: [][0])
        one = request("unconcerned")
        with suppress(EngineDeadError):
            await soon(collect(client, one), 5.0)


# -- the end of the engine ------------------------------------------------------------------------------------


async def test_a_killed_engine_is_noticed_by_all() -> None:
    async with running(SLOW, step_seconds=0.005) as client:
        assert client.alive
        streams = [client.generate(request(str(number), **LONG)) for number in range(3)]
        for stream in streams:
            await soon(anext(stream))
        os.kill(client.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="status -9"):
                await soon(rest(stream))
        assert "status -9" in await soon(client.wait_dead())
        assert not client.alive
        with pytest.raises(EngineDeadError, match="status -9"):
            await soon(collect(client, request("late")))


async def killed(client: EngineClient) -> None:
    """Kill the engine; on return its sockets are closed, but the client may not have noticed its end."""
    os.kill(client.pid, signal.SIGKILL)
    await asyncio.sleep(0.1)


async def test_a_request_right_after_the_kill_is_answered() -> None:
    async with running() as client:
        await killed(client)
        with pytest.raises(EngineDeadError):
            await soon(collect(client, request()), 5.0)


async def test_closing_a_stream_right_after_the_kill_does_not_hang() -> None:
    async with running(SLOW, step_seconds=0.005) as client:
        stream = client.generate(request("closed", **LONG))
        await soon(anext(stream))
        await killed(client)
        await soon(stream.aclose(), 5.0)


async def test_shutting_down_right_after_the_kill_does_not_hang() -> None:
    async with running() as client:
        await killed(client)
        await soon(client.shutdown(), 5.0)


async def test_aborting_in_a_dead_engine_does_not_hang() -> None:
    async with running() as client:
        await killed(client)
        await soon(client.wait_dead())
        with suppress(EngineDeadError):
            await soon(client.abort(["nobody"]), 5.0)


async def test_what_was_finished_before_the_end_is_handed_out() -> None:
    async with running(SLOW, step_seconds=0.005) as client:
        one = request("finished", max_tokens=30)
        finished = watch(client, any_finished)
        stream = client.generate(one)
        first = await soon(anext(stream))
        await soon(finished.wait())
        await killed(client)
        await soon(client.wait_dead())
        check(Ledger([first, *await soon(rest(stream))]).got["finished"], one, SLOW)


async def test_shutdown_ends_all(short_tmp: Path) -> None:
    client = await soon(EngineClient.start(standin_config(SLOW, step_seconds=0.005)))
    stream = client.generate(request("cut off", **LONG))
    await soon(anext(stream))
    await soon(client.shutdown())
    assert not client.alive
    with pytest.raises(EngineDeadError, match="shut down"):
        await soon(rest(stream))
    with pytest.raises(EngineDeadError, match="shut down"):
        await soon(collect(client, request()))
    with pytest.raises(ProcessLookupError):
        os.kill(client.pid, 0)
    assert list(short_tmp.iterdir()) == []
    await soon(client.shutdown())


async def test_a_lane_that_fails_is_the_end_with_its_reason(capfd: pytest.CaptureFixture[str]) -> None:
    # A budget that is no number is noticed in the first step.
    async with running(token_budget="none") as client:
        with pytest.raises(EngineDeadError, match="TypeError"):
            await soon(collect(client, request()))
        assert "TypeError" in await soon(client.wait_dead())
    capfd.readouterr()


PARENT = """
import asyncio, sys
from engine.client import EngineClient
from engine.config import EngineConfig

async def main():
    client = await EngineClient.start(EngineConfig.model_validate_json(sys.argv[1]))
    print("ready", flush=True)
    await client.wait_dead()

asyncio.run(main())
"""


async def test_no_engine_outlives_the_process_that_started_it(short_tmp: Path) -> None:
    config = standin_config(PAIR).model_dump_json()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, config, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    assert await soon(parent.stdout.readline()) == b"ready\n"
    parent.kill()
    assert await soon(parent.wait()) == -signal.SIGKILL
    # Both write to this pipe: its end means that nobody is left to do so.
    assert await soon(parent.stdout.read()) == b""


# -- the start ------------------------------------------------------------------------------------------------


async def test_progress_of_a_start_that_is_refused(capfd: pytest.CaptureFixture[str], short_tmp: Path) -> None:
    with pytest.raises(EngineStartupError, match="'shards'") as caught:
        await soon(EngineClient.start(standin_config(PAIR, shards=2)))
    assert "\n" not in str(caught.value)
    assert list(short_tmp.iterdir()) == []
    capfd.readouterr()


async def test_a_process_that_ends_at_once_is_an_error(monkeypatch: pytest.MonkeyPatch, short_tmp: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineStartupError, match="ended with status 1"):
        await soon(EngineClient.start(standin_config(PAIR)), 10.0)
    assert list(short_tmp.iterdir()) == []


async def test_a_process_that_cannot_be_started_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(short_tmp / "python"))
    with pytest.raises((EngineStartupError, OSError)):
        await soon(EngineClient.start(standin_config(PAIR)))
    assert list(short_tmp.iterdir()) == []


async def test_a_start_that_is_cancelled_leaves_nothing(short_tmp: Path) -> None:
    starting = asyncio.create_task(EngineClient.start(standin_config(PAIR)))
    while not list(short_tmp.iterdir()):
        await asyncio.sleep(0.001)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(starting)
    assert list(short_tmp.iterdir()) == []

"""Case 19 of the fault list: clients that go, at any moment. Both lanes are free soon after, and it is counted."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from tests.robustness import raw
from tests.robustness.servers import LONG, MODEL, PROMPTS, FaultServer
from tests.summary import figure
from tests.waiting import eventually

ATTEMPTS = 20
"""To catch a request at a moment that passes in milliseconds."""


@pytest.fixture(autouse=True)
def _ends_well(live: FaultServer) -> Any:
    yield
    live.check_good()


def _body(stream: bool, prompt: Any, **fields: Any) -> bytes:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "stream": stream, **LONG, **fields}
    return json.dumps(body).encode()


def _arrived(metrics: dict[str, float]) -> float:
    """Generation requests that the server has taken on: of a client that goes before that, nothing is counted."""
    return metrics["collm_requests_running{}"] + metrics["collm_requests_waiting{}"]


def _ended(server: FaultServer) -> dict[str, float]:
    """How many generation requests have ended so far, by outcome."""
    return _outcomes(server.metrics())


def _outcomes(metrics: dict[str, float]) -> dict[str, float]:
    prefix = "collm_requests_total"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def _all_free(server: FaultServer, before: dict[str, float], count: int, what: str) -> None:
    """All clients have just gone: so many requests end as aborted, none otherwise, and the lanes are empty.

    Args:
        before: what had ended before they came.
    """
    gone = time.monotonic()

    def since() -> dict[str, float]:
        return {
            outcome: number - before[outcome] for outcome, number in _ended(server).items() if number > before[outcome]
        }

    eventually(lambda: sum(since().values()) >= count and server.is_empty())
    figure(f"19: {what}: both lanes free after {time.monotonic() - gone:.2f} s")
    assert since() == {"{outcome=aborted}": count}


@pytest.mark.parametrize("polite", [True, False], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_19_gone_while_it_is_written(live: FaultServer, stream: bool, polite: bool) -> None:
    before = live.metrics()
    socks = [raw.connect(live) for _ in range(8)]
    for number, sock in enumerate(socks):
        sock.sendall(raw.post(live, _body(stream, PROMPTS[number])))
    if stream:
        for sock in socks:
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    counter = "collm_lane_step_seconds_count{lane=codes}"
    eventually(lambda: _arrived(now := live.metrics()) == 8 and now.get(counter, 0.0) > before.get(counter, 0.0) + 5)
    for sock in socks:
        if polite:
            sock.close()
        else:
            raw.hang_up(sock)
    _all_free(
        live, _outcomes(before), 8, f"8 clients {'close' if polite else 'reset'}, {'stream' if stream else 'whole'}"
    )


def test_19_gone_with_many_choices(live: FaultServer) -> None:
    before = _ended(live)
    sock = raw.connect(live)
    sock.sendall(raw.post(live, _body(True, PROMPTS[:4], n=4)))
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    raw.hang_up(sock)
    _all_free(live, before, 16, "one client with 16 choices")


def test_19_gone_before_the_body_is_complete(live: FaultServer) -> None:
    before = _ended(live)
    for cut in (1, 20, 100, 200):
        sock = raw.connect(live)
        sock.sendall(raw.post(live, _body(False, PROMPTS[0]))[:-cut])
        raw.hang_up(sock)
    eventually(live.is_empty)
    assert _ended(live) == before


def test_19_half_closed_is_not_gone_for_ever(live: FaultServer) -> None:
    """A client that ends its own direction only: answered, or treated as gone; never left in the lanes."""
    sock = raw.connect(live)
    sock.sendall(raw.post(live, _body(False, PROMPTS[0], max_tokens=50)))
    sock.shutdown(1)
    assert raw.receive(sock).status in (0, 200)
    sock.close()


def _fresh(number: int, stream: bool) -> list[int]:
    """A long prompt, new to prefix caches. The tight server computes 64 tokens per step: ten steps per lane."""
    return [1 + 2 * number + stream, *range(100, 700)]


def _tokens(server: FaultServer) -> float:
    return _sum_tokens(server.metrics())


def _sum_tokens(metrics: dict[str, float]) -> float:
    return sum(value for key, value in metrics.items() if key.startswith("collm_tokens_total"))


def _four_that_always_defer(server: FaultServer, first: int, stream: bool) -> list[socket.socket]:
    """Four clients with fresh prompts, numbered from ``first``, whose requests are sent and not answered yet. What they
    ask for takes seconds: on a busy machine this process may be late with going.
    """
    socks = [raw.connect(server) for _ in range(4)]
    for number, sock in enumerate(socks):
        prompt = _fresh(first + number, stream)
        sock.sendall(raw.post(server, _body(stream, prompt, max_tokens=400, collaboration={"policy": "always"})))
    return socks


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_19_gone_in_the_middle_of_the_prompt(tight: FaultServer, stream: bool) -> None:
    """The base lane is at work on the prompts; no token is written yet. That is a matter of a few steps, so it takes
    some attempts where the machine is busy with other things; always deferring makes it twice as many steps.
    """
    for attempt in range(ATTEMPTS):
        before, tokens = _ended(tight), _tokens(tight)
        socks = _four_that_always_defer(tight, 100 + 4 * attempt, stream)
        eventually(lambda: _arrived(now := tight.metrics()) == 4 and now["collm_lane_batch_rows{lane=base}"] > 0)
        for sock in socks:
            raw.hang_up(sock)
        _all_free(tight, before, 4, f"4 clients in mid-prompt, {'stream' if stream else 'whole'}")
        in_time = _tokens(tight) == tokens
        tight.check_good()
        if in_time:
            return
    pytest.fail("the clients never went before the first token")


def _expert_at_work_before_any_token(server: FaultServer, tokens: float) -> bool:
    """Waits for four requests and the expert's first step; whether no token had been written by then."""
    snapshot: dict[str, float] = {}

    def expert_stepped() -> bool:
        snapshot.update(server.metrics())
        return _arrived(snapshot) == 4 and snapshot["collm_lane_batch_rows{lane=codes}"] > 0

    eventually(expert_stepped)
    return _sum_tokens(snapshot) == tokens


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_19_gone_while_parked(tight: FaultServer, stream: bool) -> None:
    """The base's rows are parked: the expert, asked for the first time, computes the prompts."""
    parked = False
    for attempt in range(ATTEMPTS):
        before, tokens = _ended(tight), _tokens(tight)
        socks = _four_that_always_defer(tight, 10 + 4 * attempt, stream)
        parked = _expert_at_work_before_any_token(tight, tokens)
        for sock in socks:
            raw.hang_up(sock)
        _all_free(tight, before, 4, f"4 clients while parked, {'stream' if stream else 'whole'}")
        tight.check_good()
        if parked:
            break
    assert parked, "the expert was never seen at work on the prompts"


def test_19_gone_while_waiting_in_the_queue(tight: FaultServer) -> None:
    """Four are in the lanes, six wait; those that wait go, then the others."""
    before = _ended(tight)
    socks = []
    for number in range(10):
        sock = raw.connect(tight)
        sock.sendall(raw.post(tight, _body(False, PROMPTS[number])))
        socks.append(sock)
    eventually(lambda: tight.metric("collm_requests_waiting{}") == 6)
    for sock in socks[4:]:
        raw.hang_up(sock)
    eventually(lambda: tight.metric("collm_requests_waiting{}") == 0)
    assert tight.metric("collm_requests_running{}") == 4
    for sock in socks[:4]:
        raw.hang_up(sock)
    _all_free(tight, before, 10, "10 clients, 6 of them in the queue")
    tight.check_good()

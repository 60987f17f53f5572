"""Cases 18, 20, 27 and 28 of the fault list: more than fits, all at once, slow readers, greedy clients."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.live import samples
from tests.robustness import raw
from tests.robustness.conftest import OTHER_KEY, THIRD_KEY
from tests.robustness.servers import LONG, MODEL, PROMPTS, FaultServer, check_error_body, in_background
from tests.summary import figure
from tests.waiting import eventually


def test_18_a_queue_limit_holds(tight: FaultServer) -> None:
    """60 at the same moment where 12 fit: 12 are served, and one for each that is done meanwhile; the others are told
    when to come back; none hangs.
    """
    bodies = [
        json.dumps({"model": MODEL, "prompt": PROMPTS[n], "temperature": 0, "max_tokens": 300, "ignore_eos": True})
        for n in range(60)
    ]
    before = now = tight.metrics()

    def since(outcome: str) -> float:
        name = f"collm_requests_total{{outcome={outcome}}}"
        return now.get(name, 0.0) - before.get(name, 0.0)

    def all_are_in_or_refused() -> bool:
        nonlocal now
        now = tight.metrics()
        let_in = now["collm_requests_running{}"] + now["collm_requests_waiting{}"] + since("length")
        return let_in + since("rejected") >= 60

    socks = [raw.connect(tight) for _ in bodies]
    for sock, body in zip(socks, bodies, strict=True):
        sock.sendall(raw.post(tight, body.encode()))
    eventually(all_are_in_or_refused)
    # None, but on a machine that has no time for clients.
    done = since("length")
    figure(f"18: 60 where 12 fit: {done:.0f} were done before the last was looked at")
    replies = [raw.receive(sock) for sock in socks]
    for sock in socks:
        sock.close()
    served = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status == 429]
    assert len(served) + len(refused) == 60
    assert 12 <= len(served) <= 12 + done
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        error = check_error_body(reply.json())
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    now = tight.metrics()
    assert since("rejected") == len(refused)
    for reply in served:
        assert reply.json()["usage"]["completion_tokens"] == 300
    tight.check_good()


def test_18_choices_count(tight: FaultServer) -> None:
    """One request with more choices than will ever fit is a bad request, not a busy server."""
    response = tight.complete(max_tokens=4, n=13)
    assert response.status_code == 400
    assert check_error_body(response.json())["param"] == "n"
    assert tight.complete(max_tokens=4, n=12).status_code == 200
    tight.check_good()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_20_200_cancelled_at_once(live: FaultServer, stream: bool) -> None:
    aborted = live.outcomes("aborted")
    socks = []
    for number in range(200):
        body = {"model": MODEL, "prompt": PROMPTS[number % len(PROMPTS)], "stream": stream, **LONG}
        sock = raw.connect(live)
        sock.sendall(raw.post(live, json.dumps(body).encode()))
        socks.append(sock)
    eventually(lambda: live.metric("collm_requests_running{}") + live.metric("collm_requests_waiting{}") == 200)
    for sock in socks:
        raw.hang_up(sock)
    gone = time.monotonic()
    eventually(lambda: live.outcomes("aborted") == aborted + 200 and live.is_empty())
    figure(f"20: 200 cancelled at once, {'stream' if stream else 'whole'}: {time.monotonic() - gone:.2f} s until free")
    live.check_good()


def test_20_200_short_ones_cancelled_at_any_moment(live: FaultServer) -> None:
    """Clients that go while, before and after they are answered: each request ends exactly once."""
    names = ("aborted", "stop", "length", "error", "rejected")
    before = {name: live.outcomes(name) for name in names}
    for number in range(200):
        body = {"model": MODEL, "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 12, "stream": number % 2 == 0}
        sock = raw.connect(live)
        sock.sendall(raw.post(live, json.dumps(body).encode()))
        time.sleep(number % 10 * 0.003)
        raw.hang_up(sock)
    eventually(live.is_empty)
    after = {name: live.outcomes(name) - before[name] for name in names}
    # One whose client goes before it was looked at is not counted at all; none counts twice, none fails.
    assert sum(after.values()) <= 200
    assert after["error"] == after["rejected"] == 0
    live.check_good()


def test_27_slow_readers_cost_bounded_memory(live: FaultServer) -> None:
    """Streams that nobody reads: the engine is not held up, memory is bounded, and the clients are let go."""
    baseline = live.text(PROMPTS[3], max_tokens=200, ignore_eos=True)
    aborted = live.outcomes("aborted")
    before = live.parent().memory_info().rss
    # The report makes each event large: more than the socket's buffers take.
    body: dict[str, Any] = {
        "model": MODEL, "prompt": PROMPTS[0], "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 16,
        "logprobs": 5, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "collaboration": {"report": True, "policy": "random"},
    }  # fmt: skip
    socks = []
    for _ in range(2):
        sock = raw.connect(live, receive_buffer=4096)
        sock.sendall(raw.post(live, json.dumps(body).encode()))
        socks.append(sock)
    eventually(lambda: live.metric("collm_requests_running{}") > 0)
    # Others are served meanwhile, and correctly.
    assert live.text(PROMPTS[3], max_tokens=200, ignore_eos=True) == baseline
    eventually(live.is_empty, seconds=120)
    grown = live.parent().memory_info().rss - before
    assert live.outcomes("aborted") > aborted, "nobody had to be let go: the streams were too small for this test"
    figure(f"27: 2 readers of 16 choices each that never read: the HTTP process grew by {grown / (1 << 20):.0f} MiB")
    assert grown < 150 * (1 << 20)
    for sock in socks:
        sock.close()
    live.check_good()


def test_28_one_user_with_a_thousand_long_prompts(live: FaultServer) -> None:
    """Somebody else's short requests are answered while most of the flood still waits."""
    flood: list[socket.socket] = []
    other = replace(live, key=OTHER_KEY)
    try:
        for number in range(8):
            prompts = [[1 + number, 1 + index, *range(2, 400)] for index in range(125)]
            body = {"model": MODEL, "prompt": prompts, "max_tokens": 32, "ignore_eos": True}
            request = raw.post(live, json.dumps(body).encode())
            flood.append(raw.connect(live))
            flood[-1].sendall(request)
        eventually(lambda: live.metric("collm_requests_waiting{}") >= 900)
        # The user field says nothing about who somebody is.
        short = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0, "user": "flood"}
        ask, count = raw.post(other, json.dumps(short).encode()), raw.head(other, method=b"GET", path=b"/metrics")
        begin = time.monotonic()
        # Counted by the server, in the same breath: this process may have to wait while the flood is served.
        replies = raw.send_in_a_row(other, [count, ask, count, ask, ask, ask, count])
        seconds = time.monotonic() - begin
        assert [reply.status for reply in replies] == [200] * 7
        begun, first, all_four = (
            samples(replies[number].body.decode())["collm_requests_total{outcome=length}"] for number in (0, 2, 6)
        )
        figure(
            f"28: four requests beside 1,000: the first answered after {first - begun:.0f} of them, all four after "
            f"{all_four - begun:.0f}, in {seconds:.2f} s"
        )
        assert first - begun <= 80, "a client that came a moment later waited for the flood"
        # In step with the flood from then on: no more than a request of its own for each long one.
        assert all_four - begun <= 320
    finally:
        for sock in flood:
            raw.hang_up(sock)
        live.check_good()


def test_28_one_user_who_fills_the_queue(tight: FaultServer) -> None:
    """It is told to come back; others are still let in, and each of them too leaves room for one more."""
    rejected = tight.outcomes("rejected")
    flood = [raw.connect(tight) for _ in range(16)]
    body = json.dumps({"model": MODEL, "prompt": PROMPTS[0], **LONG}).encode()
    for sock in flood:
        sock.sendall(raw.post(tight, body))
    eventually(lambda: tight.outcomes("rejected") == rejected + 4)
    others = (OTHER_KEY, THIRD_KEY)
    with in_background(6) as submit:
        answers = {
            key: [submit(replace(tight, key=key), False, PROMPTS[0], max_tokens=4) for _ in range(3)] for key in others
        }
    for key in others:
        statuses = sorted(answer.result().status for answer in answers[key])
        assert statuses[0] == 200, f"{key} was kept out"
        assert set(statuses) <= {200, 429}
    for sock in flood:
        raw.hang_up(sock)
    tight.check_good()

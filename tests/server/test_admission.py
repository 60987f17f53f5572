"""Who gets a place in the queue, and what the others are told."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.admission import Admission
from server.auth import client_of
from server.errors import ApiError
from tests.server.conftest import Build, House
from tests.server.fakes import check_error, waits_forever


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counter(Admission):
    """Holds what was taken: a place that nobody holds is given back."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken: list[AbstractContextManager[None]] = []


def admission(running: int = 4, queued: int = 8, reserve: int = 4, clock: Any = None) -> Counter:
    return Counter(running, queued, reserve, 2, clock or Clock())


def takes(admission: Counter, client: str, most: int = 1000) -> list[AbstractContextManager[None]]:
    """Take places one request after the other until there are none, or so many are taken."""
    taken: list[AbstractContextManager[None]] = []
    while len(taken) < most:
        place = admission.reserve(client, 1, "n")
        try:
            place.__enter__()
        except ApiError:
            return taken
        taken.append(place)
        admission.taken.append(place)
    return taken


def test_one_client_alone_may_fill_the_queue_and_no_more() -> None:
    it = admission()
    assert len(takes(it, "flood")) == 12
    assert it.in_flight == 12


def test_the_others_are_let_in_beyond_it() -> None:
    it = admission()
    takes(it, "flood")
    assert [len(takes(it, client)) for client in ("b", "c", "d", "e")] == [2, 1, 1, 0]
    assert it.in_flight == 16


def test_whoever_filled_it_gets_nothing_of_the_reserve_back() -> None:
    it = admission()
    places = takes(it, "flood")
    (others,) = takes(it, "b", most=1)
    places[0].__exit__(None, None, None)
    assert len(takes(it, "flood")) == 0, "the place that it left is the one that the other holds beyond the queue"
    others.__exit__(None, None, None)
    assert len(takes(it, "flood")) == 1


def test_without_a_reserve_it_is_first_come_first_served() -> None:
    it = admission(reserve=0)
    takes(it, "flood")
    assert len(takes(it, "b")) == 0


def test_more_than_ever_fits_is_not_a_matter_of_load() -> None:
    with pytest.raises(ApiError, match="takes at most 12 at once") as caught, admission().reserve("a", 13, "n"):
        pass
    assert caught.value.status == 400


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 6), st.booleans()), max_size=60))
def test_any_sequence(steps: list[tuple[str, int, bool]]) -> None:
    """The total is bounded, counts are right at the end, and whoever holds nothing gets a place while one is left."""
    it = admission()
    held: list[tuple[str, ExitStack]] = []
    for client, choices, leave in steps:
        if leave and held:
            held.pop(0)[1].close()
            continue
        stack = ExitStack()
        newcomer = all(other != client for other, _ in held)
        try:
            stack.enter_context(it.reserve(client, choices, "n"))
            held.append((client, stack))
        except ApiError:
            assert it.in_flight + choices > 12
            assert not newcomer or it.in_flight + choices > 16
        assert it.in_flight <= 16
    for _, stack in held:
        stack.close()
    assert it.in_flight == 0
    assert not it._held


# -- what those are told that find no room --------------------------------------------------------------------


def told(it: Admission, client: str, choices: int = 1) -> int:
    with pytest.raises(ApiError) as caught, it.reserve(client, choices, "n"):
        pass
    assert caught.value.status == 429
    return int(caught.value.headers["Retry-After"])


def test_retry_after_is_what_the_pace_promises() -> None:
    clock = Clock()
    it = admission(reserve=0, clock=clock)
    places = takes(it, "a")
    assert told(it, "a") == 2, "nothing is known yet: the least"
    for _ in range(5):
        clock.now += 4
        places.pop(0).__exit__(None, None, None)
    # Five in 16 seconds since the first: one in 4 s.
    takes(it, "a")
    assert told(it, "a") == 4
    assert told(it, "a", 5) == 20
    clock.now += 16
    assert told(it, "a") == 8, "nobody was answered for a while: the pace is slower now"
    clock.now += 10_000
    assert told(it, "a") == 60


def test_retry_after_is_never_less_than_configured() -> None:
    clock = Clock()
    it = admission(reserve=0, clock=clock)
    for place in takes(it, "a"):
        clock.now += 0.001
        place.__exit__(None, None, None)
    takes(it, "a")
    assert told(it, "a") == 2


def test_somebody_else_waits_for_less() -> None:
    """A place in the reserve is enough for one that holds nothing; whoever filled the queue waits for one in it."""
    clock = Clock()
    it = admission(reserve=2, clock=clock)
    places = takes(it, "flood")
    others = takes(it, "b", most=1) + takes(it, "c", most=1)
    for place in (places.pop(), others.pop()):
        clock.now += 5
        place.__exit__(None, None, None)
    takes(it, "d")
    assert it.in_flight == 13
    assert told(it, "e", 2) == 5
    assert told(it, "flood", 1) == 10


# -- whose request it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "client"),
    [
        ({"api_key": 0, "client": ("1.2.3.4", 5)}, "key 0"),
        ({"api_key": None, "client": ("1.2.3.4", 5)}, "1.2.3.4"),
        ({"client": ("1.2.3.4", 6)}, "1.2.3.4"),
        ({"client": ("2001:db8:1:2:aaaa::1", 5)}, "2001:db8:1:2::/64"),
        ({"client": ("2001:db8:1:2:bbbb::2", 5)}, "2001:db8:1:2::/64"),
        ({"client": ("::ffff:1.2.3.4", 5)}, "1.2.3.4"),
        ({"client": ("a" * 200, 0)}, "a" * 64),
        ({"client": None}, ""),
        ({}, ""),
    ],
)
def test_client_of(scope: dict[str, Any], client: str) -> None:
    assert client_of(scope) == client


async def complete(house: House, key: str | None, **fields: Any) -> Any:
    body = {"model": "collm-demo", "prompt": "Hello", "max_tokens": 2, **fields}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await house.http.post("/v1/completions", json=body, headers=headers)


async def test_the_engine_is_told_whose_request_it_is(build: Build) -> None:
    house = await build(server={"api_keys": ["first", "second"]})
    for key in ("first", "second", "first"):
        assert (await complete(house, key, user="me", n=2)).status_code == 200
    chat = {"model": "collm-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    headers = {"Authorization": "Bearer second"}
    assert (await house.http.post("/v1/chat/completions", json=chat, headers=headers)).status_code == 200
    clients = [request.client for request in house.engine.seen]
    assert clients == ["key 0"] * 2 + ["key 1"] * 2 + ["key 0"] * 2 + ["key 1"]


async def test_without_keys_it_is_the_address(build: Build) -> None:
    house = await build()
    await complete(house, None, user="me")
    assert [request.client for request in house.engine.seen] == ["127.0.0.1"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_fills_the_queue_keeps_nobody_out(build: Build, stream: bool) -> None:
    house = await build(
        waits_forever,
        scheduler={"max_num_seqs": 4},
        server={"max_queued_requests": 8, "api_keys": ["flood", "other"]},
    )
    flood = [asyncio.create_task(complete(house, "flood", stream=stream)) for _ in range(60)]
    refused = 0
    while refused < 48:
        done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        for request in done:
            check_error(request.result(), 429)
        flood = [request for request in flood if request not in done]
        refused += len(done)
    other = asyncio.create_task(complete(house, "other", stream=stream))
    async with asyncio.timeout(10):
        while len(house.engine.seen) < 13:
            assert not other.done()
            await asyncio.sleep(0.001)
    assert house.engine.seen[-1].client == "key 1"
    for request in [*flood, other]:
        request.cancel()
    await asyncio.gather(*flood, other, return_exceptions=True)
    assert house.service.admission.in_flight == 0

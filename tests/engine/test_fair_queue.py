"""The queue that clients share, by hand and against a slow reading of the paper's algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fair_queue import FairQueue
from tests.engine.builders import Rig, request

CLIENTS = "abc"
MOST = 50
"""The greatest cost of an item, and of one later charge."""


def filled(*items: tuple[str, str, int]) -> FairQueue[str]:
    """A queue of (key, client, cost); an item is its key in capitals."""
    queue: FairQueue[str] = FairQueue()
    for key, client, cost in items:
        queue.push(key, key.upper(), client=client, cost=cost)
    return queue


def order(queue: FairQueue[str]) -> list[str]:
    return [queue.pop()[0] for _ in range(len(queue))]


# -- by hand --------------------------------------------------------------------------------------------------


def test_one_client_is_served_first_come_first_served() -> None:
    assert order(filled(("1", "a", 9), ("2", "a", 1), ("3", "a", 5))) == ["1", "2", "3"]


def test_equal_clients_take_turns() -> None:
    queue = filled(*((f"a{n}", "a", 10) for n in range(4)), *((f"b{n}", "b", 10) for n in range(2)))
    assert order(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue = filled(*((f"long{n}", "a", 40) for n in range(3)), *((f"short{n}", "b", 10) for n in range(12)))
    taken = order(queue)
    assert taken[:10] == [
        "long0", "short0", "short1", "short2", "short3", "long1", "short4", "short5", "short6", "short7",
    ]  # fmt: skip


def test_a_newcomer_is_next_whatever_waits() -> None:
    queue = filled(*((f"flood{n}", "a", 400) for n in range(1000)))
    for _ in range(16):
        queue.pop()
    queue.push("new", "new", client="b", cost=10)
    assert "new" in [queue.pop()[0] for _ in range(2)]


def test_what_was_written_later_counts() -> None:
    queue = filled(("a0", "a", 1), ("a1", "a", 1), ("b0", "b", 1), ("b1", "b", 1))
    assert [queue.pop()[0] for _ in range(2)] == ["a0", "b0"]
    queue.charge("a", 100)
    queue.push("b2", "B2", client="b", cost=1)
    assert order(queue) == ["b1", "b2", "a1"]


def test_a_pause_is_not_saved_up() -> None:
    """Somebody who comes back shares from then on; it does not get all that others had meanwhile."""
    queue = filled(("b0", "b", 1), *((f"a{n}", "a", 10) for n in range(20)))
    for _ in range(10):
        queue.pop()
    for n in range(1, 10):
        queue.push(f"b{n}", "", client="b", cost=10)
    assert order(queue)[:4] in (["a9", "b1", "a10", "b2"], ["b1", "a9", "b2", "a10"])


def test_a_pause_while_nothing_waits_is_not_saved_up_either() -> None:
    queue = filled(("b0", "b", 1), ("a0", "a", 1000))
    assert order(queue) == ["b0", "a0"]
    for n in range(1, 4):
        queue.push(f"b{n}", "", client="b", cost=10)
        queue.push(f"a{n}", "", client="a", cost=10)
    assert order(queue) == ["b1", "a1", "b2", "a2", "b3", "a3"]


def test_what_is_removed_costs_nothing() -> None:
    queue = filled(("a0", "a", 10), ("a1", "a", 10), ("b0", "b", 10))
    assert queue.remove("a0") == "A0"
    assert queue.remove("a0") is None
    assert "a0" not in queue
    assert len(queue) == 2
    assert order(queue) == ["a1", "b0"]


def test_keys_are_unique_and_an_empty_queue_gives_nothing() -> None:
    queue = filled(("a0", "a", 1))
    with pytest.raises(KeyError):
        queue.push("a0", "", client="b", cost=1)
    queue.pop()
    with pytest.raises(IndexError):
        queue.pop()


def test_clients_that_come_and_go_are_forgotten() -> None:
    """Any number of addresses, each with one request that leaves again, costs a bounded amount of memory."""
    queue: FairQueue[str] = FairQueue(idle_clients=8)
    queue.push("stays", "", client="a", cost=1)
    for number in range(10_000):
        queue.push(f"{number}", "", client=f"client-{number}", cost=1)
        queue.remove(f"{number}")
    assert len(queue._clients) <= 9
    assert len(queue._lines) == 1
    queue.charge("client-0", 5)
    assert order(queue) == ["stays"]


# -- against the algorithm as the paper has it ----------------------------------------------------------------


@dataclass
class Plain:
    """Algorithm 2 with lists and searches, and the clients in the order in which their lines came to the front."""

    counters: dict[str, int] = field(default_factory=dict)
    line: list[tuple[str, str, int]] = field(default_factory=list)
    last: str | None = None

    def waiting(self) -> set[str]:
        return {client for _, client, _ in self.line}

    def least(self) -> int:
        return min(self.counters[client] for client in self.waiting())

    def push(self, key: str, client: str, cost: int) -> None:
        waiting = self.waiting()
        if client not in waiting:
            level = self.least() if waiting else self.counters.get(self.last or "", 0)
            self.counters[client] = max(self.counters.get(client, 0), level)
        self.line.append((key, client, cost))

    def take(self, key: str) -> tuple[str, int]:
        (found,) = (item for item in self.line if item[0] == key)
        self.line.remove(found)
        if found[1] not in self.waiting():
            self.last = found[1]
        return found[1], found[2]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from(CLIENTS), st.integers(0, MOST)),
        st.tuples(st.just("pop"), st.just(""), st.just(0)),
        st.tuples(st.just("charge"), st.sampled_from(CLIENTS), st.integers(0, MOST)),
        st.tuples(st.just("remove"), st.just(""), st.integers(0, 40)),
    ),
    max_size=80,
)


@settings(max_examples=400)
@given(OPERATIONS)
def test_it_is_the_papers_algorithm(operations: list[tuple[str, str, int]]) -> None:
    """Whoever is taken has the least counter, and is the oldest of its client; nothing is lost or comes twice."""
    queue: FairQueue[str] = FairQueue()
    plain = Plain()
    for number, (what, client, amount) in enumerate(operations):
        key = str(number)
        if what == "push":
            queue.push(key, key, client=client, cost=amount)
            plain.push(key, client, amount)
        elif what == "charge":
            queue.charge(client, amount)
            if client in plain.counters:
                plain.counters[client] += amount
        elif what == "remove" and plain.line:
            key = plain.line[amount % len(plain.line)][0]
            assert queue.remove(key) == key
            plain.take(key)
        elif what == "pop" and plain.line:
            least = plain.least()
            key, item = queue.pop()
            assert item == key
            client, cost = plain.take(key)
            assert plain.counters[client] == least
            plain.counters[client] += cost
            assert not any(other == client and int(older) < int(key) for older, other, _ in plain.line)
        assert len(queue) == len(plain.line)
        assert all(key in queue for key, _, _ in plain.line)
    assert sorted(order(queue)) == sorted(key for key, _, _ in plain.line)


@settings(max_examples=300)
@given(
    st.lists(st.integers(1, MOST), min_size=1, max_size=30),
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, MOST)), max_size=120),
    st.integers(0, 60),
)
def test_nobody_starves(own: list[int], others: list[tuple[str, int]], served: int) -> None:
    """From its arrival on, as long as it waits, nobody gets more than one item's cost ahead of a client, however
    much they had queued before; nor does it get far ahead of them.
    """
    queue: FairQueue[str] = FairQueue()
    costs: dict[str, int] = {}
    left = dict.fromkeys("axyz", 0)

    def push(client: str, cost: int) -> None:
        key = f"{client}{len(costs)}"
        costs[key] = cost
        left[client] += 1
        queue.push(key, key, client=client, cost=cost)

    def pop() -> tuple[str, int]:
        key, _ = queue.pop()
        left[key[0]] -= 1
        return key[0], costs[key]

    for client, cost in others:
        push(client, cost)
    for _ in range(min(served, len(others))):
        pop()
    for cost in own:
        push("a", cost)
    got = dict.fromkeys("axyz", 0)
    while left["a"]:
        client, cost = pop()
        got[client] += cost
        for client in "xyz":
            if left["a"]:
                assert got[client] - got["a"] <= MOST
            if left[client]:
                # One for what it may have been behind when a came.
                assert got["a"] - got[client] <= 2 * MOST


# -- in the scheduler -----------------------------------------------------------------------------------------


def both_lanes(rig: Rig) -> None:
    for lane in range(len(rig.lanes)):
        rig.step(lane)
    rig.deltas()


def test_a_short_request_passes_a_flood() -> None:
    rig = Rig(max_num_seqs=2, max_model_len=64)
    rig.add(*(request(f"flood{n}", range(1, 30), client="flood") for n in range(50)))
    both_lanes(rig)
    rig.add(request("short", [7], max_tokens=2, client="other"))
    ended: list[str] = []
    while "short" not in ended:
        both_lanes(rig)
        ended = [name for name in rig.ledger.got if rig.ledger.finished(name)]
        assert len(ended) < 8, "a flood that came first is served first"
    assert rig.run().keys() == {*(f"flood{n}" for n in range(50)), "short"}


def test_written_tokens_are_charged() -> None:
    """Equal prompts, but one client writes ten times as much: the other gets more requests through."""
    rig = Rig(max_num_seqs=1, max_model_len=64)
    for n in range(20):
        rig.add(request(f"long{n}", [1], max_tokens=40, client="long"))
        rig.add(request(f"short{n}", [1], max_tokens=4, client="short"))
    while sum(rig.ledger.finished(f"short{n}") for n in range(20)) < 20:
        both_lanes(rig)
    assert sum(rig.ledger.finished(f"long{n}") for n in range(20)) <= 3

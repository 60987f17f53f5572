"""Lanes that compute in another one's steps: the loop tells all before a step, and lands what it brought to each."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Literal

import pytest

from bench.standin import StandinLane
from engine.lanes import LaneReport
from engine.lanes.shelf import Shelf
from engine.loop import StepLoop
from engine.strategies.deferral.pacing import Pacer
from tests.engine.builders import make_lanes, make_scheduler, mixed_requests
from tests.engine.oracle import Ledger, Pair, check

PAIR = Pair(experts=3)
HOSTS = (0, 0, 2, 0)
"""Two adapters of the base, and a whole model between them."""


class Guest(StandinLane):
    def start(self) -> Future[LaneReport]:
        raise AssertionError("nobody starts a guest")


class Host(StandinLane):
    guests: dict[int, StandinLane]

    def has_work(self) -> bool:
        return super().has_work() or any(guest.has_work() for guest in self.guests.values())

    def start(self) -> Future[LaneReport]:
        future = super().start()
        report = future.result()
        for number, guest in self.guests.items():
            if guest.has_work():
                report.guests[number] = StandinLane.start(guest).result().samples
        return future


def _loop(coordination: Literal["lockstep", "overlapped"], **options: int) -> StepLoop:
    kinds = (Host, Guest, StandinLane, Guest)
    shelf = Shelf()
    lanes = [make_lanes(PAIR, kind, shelf=shelf, **options)[number] for number, kind in enumerate(kinds)]
    host = lanes[0]
    assert isinstance(host, Host)
    host.guests = {1: lanes[1], 3: lanes[3]}
    pacer = Pacer(PAIR.lanes, guests=True)
    scheduler = make_scheduler(PAIR)
    return StepLoop(scheduler, list(lanes), coordination, pacer, hosts=HOSTS)


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
@pytest.mark.parametrize("options", [{}, {"token_budget": 7, "kv_tokens": 80}])
def test_guests_write_what_lanes_of_their_own_write(
    coordination: Literal["lockstep", "overlapped"], options: dict[str, int]
) -> None:
    loop = _loop(coordination, **options)
    scheduler, ledger = loop._scheduler, Ledger()
    requests = mixed_requests(40, PAIR)
    for one in requests:
        scheduler.add(one)
    while loop.step() or not scheduler.idle:
        ledger.take(scheduler.take_deltas())
    for one in requests:
        check(ledger.got[one.request_id], one, PAIR)
    stats = loop.stats()
    assert stats.integrity_errors == 0
    assert all(lane.steps for lane in stats.lanes)


def test_an_adapters_rows_are_priced_by_the_base() -> None:
    """Nothing is ever observed of a guest's own steps; a draft takes a place in the base's step for each of the two."""
    alone, host = Pacer(2), Pacer(2, guests=True)
    for pacer in (alone, host):
        for rows in [*range(1, 33)] * 4 + [8] * 60:
            pacer.observe(0, rows, rows, 0.001 + 0.0001 * rows, gained=rows)
    # Some 4,400 tokens per second, and 0.2 ms for a draft: it must stand nine times of ten.
    assert host.draft_pays(0.95)
    assert not host.draft_pays(0.7)
    assert alone.draft_pays(0.7), "no cycle has ended: nothing is known yet"

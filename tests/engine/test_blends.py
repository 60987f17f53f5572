"""Blends against brute force, with drafts and members that speak one after the other; and that each part is needed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from engine.blends import Blend, problem
from engine.lanes.interface import Sample
from engine.lanes.shelf import Offer, Shelf
from engine.sequence import Sequence
from engine.strategies.deferral.blending import BlendDecoding
from engine.types import Token
from tests.engine.builders import Rig, request
from tests.engine.oracle import check

BLENDS = (
    Blend("mixture", ((0, 0.5), (1, 0.5))),
    Blend("product", ((0, 1.0), (1, 1.0), (2, -1.0))),
    Blend("union", ((1, 0.5), (2, 0.5))),
    Blend("mixture", ((0, 1.0), (1, 1.0), (2, 1.0)), from_gate=True),
)


def serve(vocab_size: int) -> None:
    """Requests with every blend, of which the base drafts three tokens for one step of the others."""
    rig = Rig(vocab_size=vocab_size, experts=2)
    requests = [
        request(
            str(number),
            [number % vocab_size, 1],
            max_tokens=20,
            policy="always" if number < 8 else "threshold",
            blend=BLENDS[number % len(BLENDS)],
            run_ahead=4,
            seed=number,
            prompts=((1, [1] * (number % 5 + 1)),) if number % 3 == 0 else (),
        )
        for number in range(12)
    ]
    rig.add(*requests)
    for _ in range(400):
        rig.deltas()
        if rig.scheduler.idle:
            break
        for lane in (0, 0, 0, 1, 2):
            rig.step(lane)
    for each in requests:
        check(rig.ledger.got[each.request_id], each, rig.pair)
    assert [lane.leftovers() for lane in rig.lanes] == [[]] * 3


@pytest.mark.parametrize("vocab_size", [2, 3, 16])
def test_written_as_brute_force_writes(vocab_size: int) -> None:
    serve(vocab_size)


def keeps_the_first_offer(self: Shelf, lane: int, request_id: str, index: int, offer: Offer) -> None:
    """What was laid down after a text that has been cut stays."""
    if self.get(lane, request_id, index) is None:
        PUT(self, lane, request_id, index, offer)


def skips_members(self: BlendDecoding, sample: Sample) -> tuple[int, float | None]:
    """The one that writes is asked at once; those before it never."""
    writer, deferral = DECIDE(self, sample)
    return (self.chain[-1] if writer else writer), deferral


def loses_support(self: Sequence, token: Token) -> None:
    WRITE(self, msgspec.structs.replace(token, support=None))


PUT, SETTLE, DECIDE, WRITE = Shelf.put, Shelf.settle, BlendDecoding._decide, Sequence.write
SABOTAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "an offer is never replaced": lambda patch: patch.setattr(Shelf, "put", keeps_the_first_offer),
    "an offer is never forgotten": lambda patch: patch.setattr(Shelf, "forget", lambda *_: None),
    "an offer is settled too early": lambda patch: patch.setattr(
        Shelf, "settle", lambda self, lane, request_id, final: SETTLE(self, lane, request_id, final + 1)
    ),
    "members are skipped": lambda patch: patch.setattr(BlendDecoding, "_decide", skips_members),
    "support is lost": lambda patch: patch.setattr(Sequence, "write", loses_support),
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_finds(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SABOTAGES[sabotage](monkeypatch)
    with pytest.raises(AssertionError):
        serve(3)


def test_the_shelf_counts_what_lies_on_it() -> None:
    shelf = Shelf(capacity=100)
    row = memoryview(bytes(60))
    shelf.put(0, "a", 3, Offer(row))
    shelf.put(0, "a", 3, Offer(row))
    assert shelf.has_room
    shelf.put(1, "a", 3, Offer(row))
    assert not shelf.has_room
    shelf.settle(0, "a", 3)
    assert not shelf.has_room
    shelf.settle(0, "a", 4)
    assert shelf.has_room
    shelf.forget(1, "a")
    assert (shelf.held(0), shelf.held(1)) == (["a"], [])
    shelf.forget(0, "a")
    assert shelf.held(0) == []


def test_a_full_shelf_stops_drafts() -> None:
    rig = Rig(shelf_has_room=lambda: False)
    rig.add(request(max_tokens=5, policy="always", blend=BLENDS[0], run_ahead=4))
    rig.step(0)
    assert rig.step(0) == []
    rig.run()
    assert rig.scheduler.counters.runahead_accepted == 0


@pytest.mark.parametrize("weights", [((0, 0.0), (1, 0.0)), ((0, float("nan")), (1, 1.0)), ((1, 0.5), (0, 0.5)), ()])
def test_no_blend(weights: tuple[tuple[int, float], ...]) -> None:
    assert problem(Blend("mixture", weights), 2, has_gate=True) is not None
    assert problem(Blend("product", weights), 2, has_gate=True) is not None

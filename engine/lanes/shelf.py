"""Where the members of a blend lay their distributions down for the one that writes.

One shelf serves all lanes of an engine. This one is for lanes that compute in the engine's own process: what lies there
are tensors on the lanes' device. Nobody locks: lanes step one after the other. Lanes in worker processes have another
(:mod:`engine.vllm_hooks.shared_shelf`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

DEFAULT_BYTES = 256 << 20
"""What may lie on a shelf before requests with blends stop drafting ahead. One row of 150,000 float32 logits has
600 kB; without drafts one row per request and member lies there."""


class Offer(NamedTuple):
    """What one member says at one position.

    Attributes:
        row: its distribution, in whatever form the lanes compute.
        gate: the gate's values there, if the blend wants them.
    """

    row: Any
    gate: Any = None


class Shelf:
    """Offers by lane, request, and number of tokens that were written before the position.

    Args:
        capacity: bytes, see :attr:`has_room`.
    """

    def __init__(self, capacity: int = DEFAULT_BYTES) -> None:
        self._capacity = capacity
        self._bytes = 0
        self._offers: dict[tuple[int, str], dict[int, Offer]] = {}

    @property
    def has_room(self) -> bool:
        """Whether more should be laid down than the next position needs."""
        return self._bytes < self._capacity

    @property
    def window(self) -> int | None:
        """How many positions of one request may lie there together where :attr:`has_room` is not asked; None: any."""
        return None

    def put(self, lane: int, request_id: str, index: int, offer: Offer) -> None:
        """Lay an offer down; one that lay there is forgotten, since the text before it may have changed."""
        offers = self._offers.setdefault((lane, request_id), {})
        if index in offers:
            self._bytes -= _size(offers[index])
        offers[index] = offer
        self._bytes += _size(offer)

    def get(self, lane: int, request_id: str, index: int) -> Offer | None:
        """The lane's offer at a position; it stays."""
        return self._offers.get((lane, request_id), {}).get(index)

    def take(self, lane: int, request_id: str, index: int) -> Offer | None:
        """The lane's offer at a position, which is nobody else's: it is gone then."""
        offers = self._offers.get((lane, request_id), {})
        offer = offers.pop(index, None)
        if offer is not None:
            self._bytes -= _size(offer)
            if not offers:
                del self._offers[lane, request_id]
        return offer

    def is_empty(self, lane: int) -> bool:
        """Whether nothing of the lane's can be lying there: then there is nothing to settle or to forget."""
        return not self._offers

    def settle(self, lane: int, request_id: str, final: int) -> None:
        """The first ``final`` tokens are written: nobody will ask for their positions again."""
        offers = self._offers.get((lane, request_id))
        if not offers:
            return
        for index in [index for index in offers if index < final]:
            self._bytes -= _size(offers.pop(index))

    def forget(self, lane: int, request_id: str) -> None:
        """The lane holds the request no more."""
        for offer in self._offers.pop((lane, request_id), {}).values():
            self._bytes -= _size(offer)

    def held(self, lane: int) -> list[str]:
        """Requests of which the lane has something on the shelf."""
        return [request_id for number, request_id in self._offers if number == lane]


def _size(offer: Offer) -> int:
    return getattr(offer.row, "nbytes", 0)

"""The waiting queue that clients share: whoever was served least is next.

The method is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024, arXiv
2401.00588, algorithm 2). A client's counter is the service that it has received, in weighted tokens: its prompts are
charged when they are taken from the queue, its written tokens as they are written, so that no length has to be known
beforehand. The next request is the oldest one of the client with the least counter. A client that comes back after a
pause is lifted to the others' level: what it did not use meanwhile is not saved up. Nothing is held back on purpose:
while one client alone has requests, it gets everything.
"""

from __future__ import annotations

from collections import OrderedDict
from operator import attrgetter
from typing import Generic, TypeVar

T = TypeVar("T")

PROMPT_TOKEN_COST = 1
WRITTEN_TOKEN_COST = 2
"""What tokens count: a written one twice a prompt's, as in the paper's evaluation and in typical API pricing."""

IDLE_CLIENTS = 1024
"""Clients without a waiting request whose counters are remembered; clients can be as many as there are addresses."""


class _Client(Generic[T]):
    """One client: what it has been charged, and what it has waiting, in order of arrival."""

    __slots__ = ("counter", "name", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.counter = 0
        self.waiting: dict[str, tuple[T, int]] = {}


class FairQueue(Generic[T]):
    """A queue of items under unique keys, first come, first served within a client and fair in tokens between clients.

    Deterministic: of equal counters the client is served whose line is older. Taking an item, or beginning a line,
    looks at every client that waits: some 0.1 ms for a thousand of them, and a server lets hardly more requests wait.

    Args:
        idle_clients: how many clients without waiting items are remembered; the longest idle ones are forgotten.
    """

    def __init__(self, idle_clients: int = IDLE_CLIENTS) -> None:
        self._idle_clients = idle_clients
        self._clients: dict[str, _Client[T]] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._client_of: dict[str, _Client[T]] = {}
        # Those that have something waiting, in the order in which their lines began.
        self._lines: dict[str, _Client[T]] = {}
        # Whose counter is the level to join at when nothing waits.
        self._last: _Client[T] | None = None

    def __len__(self) -> int:
        return len(self._client_of)

    def __contains__(self, key: str) -> bool:
        return key in self._client_of

    def push(self, key: str, item: T, *, client: str, cost: int) -> None:
        """Add an item at the end of its client's line.

        Args:
            cost: weighted tokens that its client is charged when it is taken.

        Raises:
            KeyError: the key is in the queue already.
        """
        if key in self._client_of:
            raise KeyError(key)
        state = self._clients.get(client)
        if state is None:
            state = self._clients[client] = _Client(client)
        if not state.waiting:
            front = self._front() or self._last
            if front is not None:
                state.counter = max(state.counter, front.counter)
            self._idle.pop(client, None)
            self._lines[client] = state
        state.waiting[key] = (item, cost)
        self._client_of[key] = state

    def pop(self) -> tuple[str, T]:
        """Take the oldest item of the client that was served least, with its key.

        Raises:
            IndexError: the queue is empty.
        """
        state = self._front()
        if state is None:
            raise IndexError("the queue is empty")
        key = next(iter(state.waiting))
        cost = state.waiting[key][1]
        item = self._take(key, state)
        state.counter += cost
        return key, item

    def remove(self, key: str) -> T | None:
        """Take an item out of the line, free of charge; None if there is none under this key."""
        state = self._client_of.get(key)
        return None if state is None else self._take(key, state)

    def charge(self, client: str, cost: int) -> None:
        """Count service that a client received after its item was taken; one that is forgotten is not charged."""
        state = self._clients.get(client)
        if state is not None:
            state.counter += cost

    def _front(self) -> _Client[T] | None:
        """The client with the least counter of those that have something waiting."""
        return min(self._lines.values(), key=attrgetter("counter"), default=None)

    def _take(self, key: str, state: _Client[T]) -> T:
        item, _ = state.waiting.pop(key)
        del self._client_of[key]
        if not state.waiting:
            del self._lines[state.name]
            self._last = state
            self._idle[state.name] = None
            if len(self._idle) > self._idle_clients:
                del self._clients[self._idle.popitem(last=False)[0]]
        return item

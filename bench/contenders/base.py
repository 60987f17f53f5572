"""What every contender and every process that it needs must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bench.account import Account
from bench.workload import Cell, Job

Stamp = Callable[[], None]
"""Called by a contender at each arrival of text or tokens."""


class Service(Protocol):
    """Something that runs: started once or for every round, and frozen while another contender is measured."""

    name: str

    async def start(self) -> None:
        """Start and wait until requests are taken.

        Raises:
            BenchError: it did not start.
        """
        ...

    async def stop(self) -> None:
        """End it, frozen or not."""
        ...

    @property
    def pid(self) -> int:
        """Root of its process tree."""
        ...


class Contender(Protocol):
    """One way of getting tokens out of a pair.

    Attributes:
        name: in tables.
        slow: an order of magnitude slower than the others: measured with one job a place instead of several.
    """

    name: str
    slow: bool

    @property
    def services(self) -> tuple[Service, ...]:
        """All that it needs running."""
        ...

    def takes(self, cell: Cell) -> bool:
        """Whether the cell means anything for it."""
        ...

    async def open(self) -> None:
        """Called before a measurement, when the services run."""
        ...

    async def run(self, job: Job, stamp: Stamp) -> int:
        """Complete one job, calling ``stamp`` at each arrival; returns the number of tokens.

        Raises:
            BenchError, HttpError: it failed.
        """
        ...

    def account(self) -> Account | None:
        """The engine's account since it started, where it can be seen."""
        ...

    async def close(self) -> None:
        """Called after a measurement, before services are frozen."""
        ...

"""The engine as the server sees it. :class:`engine.client.EngineClient` has this shape, and so have test doubles."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol

from engine.stats import EngineStats
from engine.types import Delta, EngineInfo, GenerationRequest


class Engine(Protocol):
    """A running engine."""

    @property
    def info(self) -> EngineInfo:
        """What was started."""
        ...

    @property
    def pid(self) -> int:
        """Its process."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest account; its list-valued fields belong to ``on_batch``."""
        ...

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta] | AsyncGenerator[Delta, None]:
        """Deltas of one request, the last of which has a finish_reason. Closing it early aborts the request.

        Raises:
            EngineDeadError: the engine is gone.
        """
        ...

    def on_batch(self, callback: Callable[[list[Delta], EngineStats], None]) -> None:
        """Have a function called on the event loop for all that one pass of the engine brought."""
        ...

    async def wait_dead(self) -> str:
        """Returns the reason once the engine has died."""
        ...

    async def shutdown(self) -> None:
        """End the engine."""
        ...

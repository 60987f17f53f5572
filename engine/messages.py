"""The messages between the engine's process and its client, one type per hop, encoded with msgspec (no pickle).

Client -> engine: Start, Submit, Abort, Shutdown. Engine -> client: Progress, Ready, Refused, Batch, Dead.
Each direction is one ZeroMQ PUSH/PULL pair over ipc, so messages of a direction arrive in order.
"""

from __future__ import annotations

import msgspec

from engine.stats import EngineStats
from engine.types import Delta, EngineInfo, GenerationRequest


class Start(msgspec.Struct, tag=True):
    """First message. ``config`` is an ``EngineConfig`` as JSON."""

    config: str


class Submit(msgspec.Struct, tag=True):
    """Requests to be queued, in order."""

    requests: list[GenerationRequest]


class Abort(msgspec.Struct, tag=True):
    """Requests to be dropped; unknown ids are ignored, since they may have finished meanwhile."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, tag=True):
    """End the process; what still runs is dropped."""


class Progress(msgspec.Struct, tag=True):
    """One line on what the engine is doing while it starts."""

    message: str


class Ready(msgspec.Struct, tag=True):
    """All lanes are loaded; requests are taken."""

    info: EngineInfo


class Refused(msgspec.Struct, tag=True):
    """The configuration cannot be served; the process ends after this."""

    message: str


class Batch(msgspec.Struct, tag=True):
    """All that one pass of the step loop brought."""

    deltas: list[Delta]
    stats: EngineStats


class Dead(msgspec.Struct, tag=True):
    """A lane failed beyond repair; the process ends after this."""

    message: str


ToEngine = Start | Submit | Abort | Shutdown
FromEngine = Progress | Ready | Refused | Batch | Dead

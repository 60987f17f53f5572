"""What the engine says of a stretch of its own work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


@dataclass
class Account:
    """The engine's own account of a stretch of work; times in seconds.

    Attributes:
        loop_seconds: wall time that the engine was not idle.
        step_seconds: the lanes' own steps, summed.
        steps: per lane.
        rows: rows in all those steps, per lane.
        computed: positions computed, per lane, prompts included.
        tokens: written tokens.
        expert_tokens: those that an expert wrote.
        lane_seconds: duration of the steps, per lane.
        device_seconds: of these, what the device computed, per lane.
        accepted: tokens that the base drafted past a deferral and that stood.
        discarded: those that did not.
        agreements: deferred positions at which the expert wrote what the base would have written.
    """

    loop_seconds: float = 0.0
    step_seconds: float = 0.0
    steps: list[int] = field(default_factory=lambda: [0, 0])
    rows: list[int] = field(default_factory=lambda: [0, 0])
    computed: list[int] = field(default_factory=lambda: [0, 0])
    tokens: int = 0
    expert_tokens: int = 0
    lane_seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    accepted: int = 0
    discarded: int = 0
    agreements: int = 0
    device_seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @classmethod
    def of(cls, lanes: int) -> Account:
        """Nothing yet, of so many lanes."""
        return cls(
            steps=[0] * lanes,
            rows=[0] * lanes,
            computed=[0] * lanes,
            lane_seconds=[0.0] * lanes,
            device_seconds=[0.0] * lanes,
        )

    def since(self, before: Account) -> Account:
        """What came after ``before``."""

        def minus(after: list[_Number], earlier: list[_Number]) -> list[_Number]:
            return [a - b for a, b in zip(after, earlier, strict=True)]

        return Account(
            self.loop_seconds - before.loop_seconds,
            self.step_seconds - before.step_seconds,
            minus(self.steps, before.steps),
            minus(self.rows, before.rows),
            minus(self.computed, before.computed),
            self.tokens - before.tokens,
            self.expert_tokens - before.expert_tokens,
            minus(self.lane_seconds, before.lane_seconds),
            self.accepted - before.accepted,
            self.discarded - before.discarded,
            self.agreements - before.agreements,
            minus(self.device_seconds, before.device_seconds),
        )

    @property
    def share(self) -> float:
        """Coordination share: the part of the engine's time that no lane's step accounts for, 0 to 1."""
        return 1.0 - self.step_seconds / self.loop_seconds if self.loop_seconds else 0.0

    @property
    def device_share(self) -> float:
        """Part of the engine's time in which a device computes for one of the lanes, 0 to 1.

        In lockstep the share in which the device is busy; lanes that step at the same time may add up to more than 1.
        """
        return sum(self.device_seconds) / self.loop_seconds if self.loop_seconds else 0.0

    @property
    def own_microseconds_per_token(self) -> float:
        """The engine's own time for each token, in microseconds."""
        return 1e6 * (self.loop_seconds - self.step_seconds) / self.tokens if self.tokens else 0.0

    @property
    def limit_tokens_per_second(self) -> float:
        """What the lanes' own steps would allow if nothing else took time (lockstep)."""
        return self.tokens / self.step_seconds if self.step_seconds else 0.0

    @property
    def lane_step_seconds(self) -> list[float]:
        """Mean duration of a step, per lane; NaN for a lane without steps."""
        return [
            seconds / steps if steps else math.nan for seconds, steps in zip(self.lane_seconds, self.steps, strict=True)
        ]

    def rows_per_step(self, lane: int) -> float:
        """Mean number of rows in a lane's steps; NaN without steps."""
        return self.rows[lane] / self.steps[lane] if self.steps[lane] else math.nan

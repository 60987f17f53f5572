"""What steps cost, fitted to what an engine said of itself, and what a pair would do at these costs.

A lane's step costs a fixed time (reading the weights, starting kernels), a time for each token computed and a time for
each row (attention, sampling). The engine's own time is a fixed part of each pass and a part of each row. How many
steps of how many rows there are is not put into a formula: the engine's own scheduler, pacer and step loop run on
stand-in lanes whose steps take the modelled time of a virtual clock. So everything that they decide is in the
prediction: catch-up, gather, run-ahead, prompts that come in while others are written.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.account import Account
from bench.contenders.engine_alone import engine_request
from bench.standin import StandinLane, next_token
from bench.workload import Job
from engine.config import SchedulerConfig
from engine.lanes.interface import Lane, LaneReport
from engine.loop import StepLoop
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.strategies.deferral.pacing import Pacer
from engine.types import BASE, RunAhead

CONTEXT = 1 << 20
"""Of stand-ins, in tokens: none of their requests reaches it."""


@dataclass(frozen=True)
class Stretch:
    """What a stretch of work was made of: the counts that its seconds are explained by."""

    counts: tuple[float, ...]
    seconds: float


def fit(stretches: Sequence[Stretch]) -> list[float]:
    """Seconds of each thing counted, by least squares of the relative errors; none is negative.

    Args:
        stretches: all with the same kinds of counts, of which there are few.
    """
    counts = np.array([stretch.counts for stretch in stretches])
    relative = counts / np.array([[stretch.seconds] for stretch in stretches])
    # Late: scipy is a dependency of this command alone.
    from scipy.optimize import nnls

    found, _ = nnls(relative, np.ones(len(relative)))
    return [float(value) for value in found]


@dataclass(frozen=True)
class StepTime:
    """What a step of a lane takes, in seconds: always, for each token computed, for each row."""

    fixed: float
    token: float
    row: float

    def seconds(self, tokens: float, rows: float) -> float:
        """Duration of one step."""
        return self.fixed + self.token * tokens + self.row * rows


@dataclass(frozen=True)
class PairCost:
    """A pair on a machine.

    Attributes:
        lanes: base, expert.
        pass_seconds: the engine's own time in each pass of its loop.
        row_seconds: its own time for each row of each step.
    """

    lanes: tuple[StepTime, StepTime]
    pass_seconds: float
    row_seconds: float

    @classmethod
    def of(cls, accounts: Iterable[Account]) -> PairCost:
        """Fitted to stretches of work in lockstep that differ in rows, in prompts, and in which lanes they used."""
        seen = list(accounts)

        def lane(number: int) -> StepTime:
            stretches = [
                Stretch((account.steps[number], account.computed[number], account.rows[number]), seconds)
                for account in seen
                if (seconds := account.lane_seconds[number]) > 0
            ]
            return StepTime(*fit(stretches))

        # In lockstep every pass steps the base, as long as anything is to be written.
        own = [
            Stretch((account.steps[BASE], sum(account.rows)), account.loop_seconds - account.step_seconds)
            for account in seen
        ]
        return cls((lane(0), lane(1)), *fit(own))


@dataclass(frozen=True)
class Predicted:
    """What would come out; seconds of the virtual clock."""

    seconds: float
    tokens: int
    expert_tokens: int
    steps: tuple[int, int]

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.tokens / self.seconds


class Clock:
    """A virtual one, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """What the time is."""
        return self.now


class AgreeingLane(StandinLane):
    """A stand-in that agrees with the base as often as it is told to."""

    _TOKENS = 1 << 31
    """So many that none agrees with another by chance."""

    def __init__(self, number: int, agreement: float, *, token_budget: int = 2048, **options: Any) -> None:
        sizes: dict[str, Any] = {"vocab_size": self._TOKENS, "max_model_len": CONTEXT, "token_budget": token_budget}
        super().__init__(number, str(number), **sizes, **options)
        self._lane = number
        self._agreement = agreement

    def _write(self, tokens: Sequence[int]) -> int:
        agrees = zlib.crc32(array("I", tokens).tobytes(), 7) < self._agreement * (1 << 32)
        return next_token(BASE if agrees else self._lane, tokens, self._TOKENS)


class _PricedLane(AgreeingLane):
    """Its steps take modelled time."""

    def __init__(self, number: int, cost: StepTime, clock: Clock, agreement: float) -> None:
        super().__init__(number, agreement)
        self._cost = cost
        self._clock = clock
        self.stepped = 0
        self.rows = 0

    def start(self) -> Future[LaneReport]:
        """One step; the virtual clock goes on by what it costs."""
        future = super().start()
        self._priced(future.result())
        return future

    def _priced(self, report: LaneReport) -> LaneReport:
        report.seconds = self._cost.seconds(report.tokens, report.rows)
        self._clock.now += report.seconds
        self.stepped += 1
        self.rows += report.rows
        return report


class _PricedHost(_PricedLane):
    """A base whose steps compute an adapter's rows too: one step's fixed time for both."""

    guest: _PricedLane

    def has_work(self) -> bool:
        """Its own, or the guest's."""
        return super().has_work() or self.guest.has_work()

    def start(self) -> Future[LaneReport]:
        """One step for both."""
        own = StandinLane.start(self).result()
        theirs = StandinLane.start(self.guest).result() if self.guest.has_work() else LaneReport([], 0.0)
        own.guests[1] = theirs.samples
        own.tokens += theirs.tokens
        own.rows += theirs.rows
        own.computed += theirs.computed
        future: Future[LaneReport] = Future()
        future.set_result(self._priced(own))
        return future


def predict(
    cost: PairCost,
    jobs: Sequence[Job],
    concurrency: int,
    settings: SchedulerConfig,
    *,
    run_ahead: RunAhead | None = None,
    agreement: float = 0.0,
    member: int | None = None,
    guest: bool = False,
) -> Predicted:
    """Run jobs in lockstep on the virtual clock, ``concurrency`` at a time, the next one when one has finished.

    Args:
        jobs: with forced deferrals, not a gate's.
        run_ahead: asked for with every job; None leaves it to ``settings``.
        agreement: how often base and expert write the same token, 0 to 1.
        member: lane that writes everything alone; None is the pair.
        guest: the expert is an adapter of the base, computed in its steps; its own costs do not count.
    """
    clock = Clock()
    kinds = (_PricedHost, _PricedLane) if guest else (_PricedLane, _PricedLane)
    lanes = [
        kind(number, each, clock, agreement) for number, (kind, each) in enumerate(zip(kinds, cost.lanes, strict=True))
    ]
    if isinstance(lanes[0], _PricedHost):
        lanes[0].guest = lanes[1]
    pacer = Pacer(
        len(lanes), gather=settings.gather, max_wait=settings.gather_max_wait_seconds, guests=guest, clock=clock
    )
    scheduler = Scheduler(
        lanes=len(lanes),
        max_num_seqs=concurrency,
        max_model_len=CONTEXT,
        eos_token_ids=(),
        strategy=Strategies(
            len(lanes), has_gate=False, policy="random", run_ahead=settings.run_ahead, draft_pays=pacer.draft_pays
        ),
        clock=clock,
    )
    plain: list[Lane] = list(lanes)
    loop = StepLoop(scheduler, plain, "lockstep", pacer, hosts=(0, 0) if guest else None)
    waiting = (engine_request(job, run_ahead, member) for job in jobs)
    for request in itertools.islice(waiting, concurrency):
        scheduler.add(request)
    tokens = expert_tokens = 0
    rows = 0
    while scheduler.running or scheduler.waiting:
        loop.step()
        for delta in scheduler.take_deltas():
            tokens += len(delta.tokens)
            expert_tokens += sum(source != BASE for source in delta.sources)
            if delta.finish_reason is not None:
                assert delta.error is None, delta.error
                for request in itertools.islice(waiting, 1):
                    scheduler.add(request)
        stepped_rows = sum(lane.rows for lane in lanes)
        clock.now += cost.pass_seconds + cost.row_seconds * (stepped_rows - rows)
        rows = stepped_rows
    return Predicted(clock.now, tokens, expert_tokens, (lanes[0].stepped, lanes[1].stepped))

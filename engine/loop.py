"""The step loop: plan, step, land, in lockstep or overlapped.

*Lockstep* steps one lane after the other. Rows stay together in one batch, which on shared hardware is worth more
than doing two things at once; while the base has something to do, an expert's step may wait until it pays (see
:mod:`engine.strategies.deferral.pacing`). *Overlapped* lets every lane step as soon as it has work, for lanes on
devices of their own; its lanes, all but one, compute in worker processes.

Steps that are only *launched* (:class:`~engine.lanes.interface.Launched`) queue up on a device. Then the loop prepares
and launches what it can, experts first, and only then waits for the oldest: the host's work on one step is done while
the device computes another one.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal

from engine.lanes.interface import Lane, LaneReport, Launched
from engine.scheduler import Scheduler
from engine.stats import EngineStats
from engine.strategies.base import StepPacer
from engine.types import BASE

logger = logging.getLogger(__name__)


class StepLoop:
    """Drives lanes for a scheduler. Everything happens in the caller's thread.

    Args:
        scheduler: decides.
        lanes: compute; the scheduler's lane numbers index this list.
        members: how many of the lanes are members; others have no account. None: all.
        hosts: for each lane the one in whose steps it computes; None: each in its own.
        coordination: see the module's docstring.
        pacer: told of every step; says in lockstep when an expert's lane should wait. None never lets one wait.
        step_timeout: seconds after which an expert's step counts as lost until it ends; a base's ends the engine.
            A lane that computes in this thread cannot be watched from here; the engine's client watches those.
        wake: called from another thread when an overlapped step has completed; must make the caller call
            :meth:`step` again.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lanes: list[Lane],
        coordination: Literal["lockstep", "overlapped"],
        pacer: StepPacer | None = None,
        step_timeout: float = 60.0,
        wake: Callable[[], None] = lambda: None,
        hosts: Sequence[int] | None = None,
        members: int | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._lanes = lanes
        self._members = lanes[:members]
        own = range(len(lanes)) if hosts is None else hosts
        # Lanes that step, each with those that it computes for: itself first, then its guests.
        self._together = {host: [host] for number, host in enumerate(own) if number == host}
        for number, host in enumerate(own):
            if number != host:
                self._together[host].append(number)
        self._overlapped = coordination == "overlapped"
        self._pacer = pacer
        self._step_timeout = step_timeout
        self._wake = wake
        # Steps that nobody waits for in place: overlapped ones, and overdue ones in either mode.
        self._under_way: dict[int, Future[LaneReport]] = {}
        self._deadlines: dict[int, float] = {}
        # Steps that wait for a device, the oldest first.
        self._launched: deque[tuple[int, Launched]] = deque()
        self._lost: set[int] = set()
        self._completed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._quiet = True
        self._loop_seconds = 0.0
        self._marked = 0.0
        self._step_seconds = 0.0
        self._integrity_errors = 0

    def step(self) -> bool:
        """One pass: every lane that has work and is free steps once. False if there was nothing to do or to wait for.

        In overlapped mode a pass does not wait, save for launched steps; completed ones are landed by the next one.

        Raises:
            Exception: a lane's step failed; the engine cannot go on.
        """
        begin = time.perf_counter()
        active = self._pass_overlapped() if self._overlapped else self._pass_lockstep()
        active = active or self._make_room()
        if active or not self._quiet:
            # From pass to pass, so that what the caller does between passes counts as coordination too.
            now = time.perf_counter()
            self._loop_seconds += now - (begin if self._quiet else self._marked)
            self._marked = now
        if active:
            self._quiet = False
        elif self._stalled():
            raise RuntimeError(f"{self._scheduler.running} requests wait for lanes that have nothing to do")
        elif not self._quiet and not self._under_way and not self._launched:
            self._rest()
        return active

    def _make_room(self) -> bool:
        """Where no lane can go on, memory of rows that wait goes to the request that was admitted first; False if none
        lacks any. Nothing else would ever free it: what those rows wait for may wait for this request in another lane.
        """
        if self._launched or not self._under_way.keys() <= self._lost:
            return False
        starved = [
            (order, number)
            for number in self._together
            if number not in self._lost and (order := self._lanes[number].starved) is not None
        ]
        if not starved:
            return False
        self._lanes[min(starved)[1]].make_room()
        return True

    def _stalled(self) -> bool:
        """Requests are left that nothing will ever end: a lane has kept a sample to itself."""
        return self._scheduler.running > 0 and not (self._under_way or self._launched or self.preparing)

    def patience(self) -> float | None:
        """Longest that a caller with nothing to do should wait before the next pass; None is as long as it takes.

        Seconds until a step that is under way becomes overdue; less while a lane prepares, see :attr:`preparing`.
        """
        waits = [max(0.0, deadline - time.monotonic()) for deadline in self._deadlines.values()]
        if self.preparing:
            waits.append(self._step_timeout / 4)
        return min(waits, default=None)

    @property
    def preparing(self) -> bool:
        """Whether requests wait for something that is not a step (a grammar). The engine must not seem dead then."""
        return any(lane.is_preparing() for lane in self._lanes)

    def stats(self) -> EngineStats:
        """The engine's account; list-valued fields are handed out once."""
        scheduler = self._scheduler
        counters = scheduler.counters
        lanes = [lane.stats() for lane in self._members]
        for number in self._lost:
            lanes[number].up = False
        return EngineStats(
            lanes,
            scheduler.running,
            scheduler.waiting,
            self._loop_seconds,
            self._step_seconds,
            scheduler.take_expert_waits(),
            counters.gate_errors,
            self._integrity_errors,
            counters.expert_failures,
            counters.runahead_accepted,
            counters.runahead_discarded,
            counters.agreements,
            counters.unaligned_deferrals,
            counters.vetoed,
            counters.regretted,
            counters.revoked,
        )

    def shutdown(self) -> None:
        """Shut the lanes down; a step that is under way is not waited for."""
        for lane in self._lanes:
            lane.shutdown()

    def _pass_lockstep(self) -> bool:
        if any(lane.depth for lane in self._lanes):
            return self._pass_launched()
        active = self._land_completed()
        base_went_on = False
        for number in self._together:
            if number in self._lost or not self._prepare(number):
                continue
            active = True
            if number == BASE:
                base_went_on = True
            elif base_went_on and self._should_wait(number):
                continue
            self._step(number)
        return active

    def _pass_launched(self) -> bool:
        """Launch what can be launched; once that is nothing, wait for the oldest step."""
        active = self._land_completed()
        started = False
        # The base last: rows that it has just been asked about may be deferred, and their experts are what takes time.
        for number in sorted(self._together, reverse=True):
            if number in self._lost or not self._may_launch(number):
                continue
            active = True
            if number != BASE and self._base_goes_on() and self._should_wait(number):
                continue
            started = True
            self._step(number)
        return active if started else self._finish_oldest() or active

    def _base_goes_on(self) -> bool:
        return self._in_flight(BASE) > 0 or self._scheduler.asks(BASE)

    def _in_flight(self, number: int) -> int:
        return sum(number == each for each, _ in self._launched)

    def _may_launch(self, number: int) -> bool:
        """Whether its device's queue has room and it has something to do, once it is told what changed."""
        return self._in_flight(number) < max(1, self._lanes[number].depth) and self._prepare(number)

    def _step(self, number: int) -> None:
        """Launch a step, or have it done."""
        future = self._lanes[number].start()
        if isinstance(future, Launched):
            self._launched.append((number, future))
            if self._pacer is not None:
                self._pacer.launch(number)
            return
        try:
            future.exception(self._step_timeout)
        except TimeoutError:
            self._watch(number, future)
            self._lose(number)
        else:
            self._land(number, future)

    def _finish_oldest(self) -> bool:
        """Wait for the step that was launched first; False if there is none."""
        if not self._launched:
            return False
        number, step = self._launched.popleft()
        step.finish()
        self._land(number, step)
        return True

    def _should_wait(self, number: int) -> bool:
        if self._pacer is None:
            return False
        outlook = self._scheduler.outlook(number, under_way=self._in_flight(BASE) > 0)
        return self._pacer.should_wait(number, outlook)

    def _pass_overlapped(self) -> bool:
        active = self._land_completed()
        for number in [number for number, deadline in self._deadlines.items() if deadline <= time.monotonic()]:
            self._lose(number)
            active = True
        # In-process lanes last: they compute in this thread, while the others are under way.
        in_process: list[tuple[int, Future[LaneReport]]] = []
        for number in reversed(self._together):
            if number in self._under_way or not self._may_launch(number):
                continue
            active = True
            future = self._lanes[number].start()
            if isinstance(future, Launched):
                self._launched.append((number, future))
            elif future.done():
                in_process.append((number, future))
            else:
                self._deadlines[number] = time.monotonic() + self._step_timeout
                self._watch(number, future)
        for number, future in in_process:
            self._land(number, future)
        return self._finish_oldest() or active

    def _prepare(self, number: int) -> bool:
        """Tell a lane and its guests what changed; False if it has nothing to do."""
        for each in self._together[number]:
            if work := self._scheduler.plan(each):
                self._lanes[each].apply(work)
        return self._lanes[number].has_work()

    def _watch(self, number: int, future: Future[LaneReport]) -> None:
        self._under_way[number] = future
        future.add_done_callback(lambda _: self._complete(number))

    def _complete(self, number: int) -> None:
        self._completed.put(number)
        self._wake()

    def _land_completed(self) -> bool:
        active = False
        while not self._completed.empty():
            number = self._completed.get()
            self._deadlines.pop(number, None)
            future = self._under_way.pop(number)
            overdue = number in self._lost
            if overdue and future.exception() is None:
                self._lost.discard(number)
                self._scheduler.regain(number)
                logger.warning("lane %s is back", self._lanes[number].info.name)
            self._land(number, future, usual=not overdue)
            active = True
        return active

    def _lose(self, number: int) -> None:
        self._deadlines.pop(number, None)
        name = self._lanes[number].info.name
        if number == BASE:
            raise TimeoutError(f"a step of lane {name} timed out after {self._step_timeout:g} s")
        logger.error("a step of lane %s timed out after %g s", name, self._step_timeout)
        self._lost.add(number)
        self._scheduler.lose(number)

    def _land(self, number: int, future: Future[LaneReport], *, usual: bool = True) -> None:
        """Take in a step; one that is not ``usual`` says nothing of what steps cost."""
        report = future.result()
        self._step_seconds += report.seconds
        scheduler = self._scheduler
        for failure in report.failures:
            scheduler.fail(failure)
        # A launched step was waited for along with those before it; what it costs is the device's time.
        seconds = (isinstance(future, Launched) and report.device_seconds) or report.seconds
        scheduler.charge(report.computed, seconds)
        gained = scheduler.land(number, report.samples)
        for guest, samples in report.guests.items():
            scheduler.land(guest, samples)
        if usual and self._pacer is not None:
            self._pacer.observe(number, report.tokens, report.rows, seconds, gained)

    def _rest(self) -> None:
        """Called once when the engine has gone idle: nothing may be left in any lane."""
        self._quiet = True
        for lane in self._lanes:
            lane.flush()
            if self._scheduler.running or self._scheduler.waiting:
                continue
            for leftover in lane.leftovers():
                self._integrity_errors += 1
                logger.error("integrity: idle lane %s still holds %s", lane.info.name, leftover)

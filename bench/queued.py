"""A stand-in for a lane whose device computes by itself: steps are launched, and wait in the device's queue.

It looks ahead as a vLLM lane does (:mod:`engine.vllm_hooks.flight`): a row that is sampled in a step that is not
finished is computed past its sample, which counts if the row turns out to go on with it.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from bench.standin import StandinLane, _Row
from engine.lanes.interface import LaneReport, LaneWork, Launched, Sample


@dataclass(slots=True)
class _Step:
    """A step that is not finished.

    Attributes:
        ends: by request, the row and its sample at its end.
        guesses: rows that look ahead in this step, and nobody has said yet that they go on like that.
    """

    ends: dict[str, tuple[_Row, Sample]] = field(default_factory=dict)
    guesses: dict[str, tuple[_Row, Sample]] = field(default_factory=dict)


class QueuedLane(StandinLane):
    """See the module's docstring; other arguments are those of :class:`~bench.standin.StandinLane`.

    Args:
        depth: see :class:`~engine.lanes.interface.Lane`.
    """

    def __init__(self, *args: Any, depth: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self._depth = depth
        self._queue: deque[_Step] = deque()
        self._last: dict[str, int] = {}
        self.looked_ahead = 0

    @property
    def depth(self) -> int:
        """How many of its steps may be launched and not finished yet."""
        return self._depth

    def apply(self, work: LaneWork) -> None:
        """Take in what changed, and compare with what was foreseen."""
        assert len(self._queue) < max(1, self._depth), "told something while there is no room for a step"
        foreseen = []
        for extension in work.extend:
            row = self._rows[extension.request_id]
            at = len(row.request.prompt) + extension.keep
            for step in self._queue:
                ahead = step.guesses.get(extension.request_id)
                goes_on = at == len(row.tokens) and extension.tokens == [self._last.get(extension.request_id)]
                if ahead is not None and ahead[0] is row and goes_on:
                    foreseen.append((step, row))
        super().apply(work)
        for step, row in foreseen:
            request_id = row.request.request_id
            step.ends[request_id] = step.guesses.pop(request_id)
            row.computed = len(row.tokens)

    def has_work(self) -> bool:
        """Whether any row has tokens left to compute, or can look ahead."""
        return super().has_work() or bool(self._can_look_ahead())

    def start(self) -> Future[LaneReport]:
        """Compute one step, whose samples are handed out when it is finished."""
        ahead = self._can_look_ahead()
        for row, sample in ahead.values():
            row.tokens.append(sample.token)
        report = super().start().result()
        step = _Step()
        samples = []
        for sample in report.samples:
            row = self._rows[sample.request_id]
            if sample.request_id in ahead:
                step.guesses[sample.request_id] = (row, sample)
            elif sample.position == len(row.tokens):
                step.ends[sample.request_id] = (row, sample)
            else:
                samples.append(sample)
        for row, _ in ahead.values():
            row.tokens.pop()
            row.computed = min(row.computed, len(row.tokens))
        self.looked_ahead += len(step.guesses)
        self._launch(report)
        if not self._depth:
            return self._done(step, samples, report)
        self._queue.append(step)
        return Launched(lambda: self._finish(step, samples, report))

    def _done(self, step: _Step, samples: list[Sample], report: LaneReport) -> Future[LaneReport]:
        self._queue.append(step)
        future: Future[LaneReport] = Future()
        future.set_result(self._finish(step, samples, report))
        return future

    def _finish(self, step: _Step, samples: list[Sample], report: LaneReport) -> LaneReport:
        assert self._queue.popleft() is step, "finished in another order"
        self._wait(report)
        ends = [sample for row, sample in step.ends.values() if self._rows.get(sample.request_id) is row]
        self._last.update((sample.request_id, sample.token) for sample in ends)
        report.samples = samples + ends
        return report

    def _launch(self, report: LaneReport) -> None:
        """What a launch costs; for lanes on a clock."""

    def _wait(self, report: LaneReport) -> None:
        """What a step's end costs; likewise."""

    def _can_look_ahead(self) -> dict[str, tuple[_Row, Sample]]:
        if self._depth < 2 or not self._queue:
            return {}
        return {
            request_id: (row, sample)
            for request_id, (row, sample) in self._queue[-1].ends.items()
            if self._rows.get(request_id) is row
            and row.computed == len(row.tokens) == sample.position
            and row.request.part is None
            and not row.request.scores
            and not row.asked
            and len(row.tokens) + 2 < self._info.max_model_len
        }

"""What travels between a lane's scheduler and its workers, riding on vLLM's own messages.

With the executors ``mp`` and ``ray`` these cross process borders inside vLLM's SchedulerOutput and
ModelRunnerOutput, by vLLM's own serialisation. This module must not import vLLM: workers unpickle it first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.lanes.interface import Part

SETTINGS_KEY = "collm"
"""Where the worker's settings lie in vLLM's ``additional_config``."""

EDITS = "collm_edits"
"""Attribute of SchedulerOutput: LaneEdits."""

READINGS = "collm_readings"
"""Attribute of ModelRunnerOutput: Readings."""


class Edit(NamedTuple):
    """The true output tokens of a request from index ``start`` on; whatever the runner has there is replaced."""

    start: int
    tokens: list[int]


class LaneEdits(NamedTuple):
    """What a worker must do for one step besides what vLLM tells it.

    Attributes:
        tokens: request id -> edit, only where the runner's own copy is not right already.
        top_probability: whether any scheduled row wants its top probability.
        asked: request id -> indices into the chunk that is computed for it: the token after each of these is sampled
            besides the one at the end.
        draw_offsets: request id -> see LaneRequest, of scheduled requests where it is not 0.
        parts: request id -> the lane's part in its blend, of scheduled requests that have one.
        ahead: requests whose last input token is the sample of the lane's last step, which the host has not read.
        scored: requests whose asked positions are scored by the token that stands there; nothing is drawn at them.
    """

    tokens: dict[str, Edit]
    top_probability: bool
    asked: dict[str, list[int]]
    parts: dict[str, Part]
    draw_offsets: dict[str, int]
    ahead: tuple[str, ...] = ()
    scored: frozenset[str] = frozenset()


NO_EDITS = LaneEdits({}, top_probability=False, asked={}, parts={}, draw_offsets={})


class Readings(NamedTuple):
    """What a worker read off the rows that were sampled, in the order of ``ModelRunnerOutput.req_ids``.

    Attributes:
        gate: [rows + samples of ``asked``][K] gate values, or None for a lane without a gate.
        top_probability: [rows + samples of ``asked``], if any row wanted it.
        asked: [samples] of ``LaneEdits.asked``, in its order.
        asked_logprobs: vLLM's ``LogprobsLists`` of these samples, if any of their requests wants log-probabilities.
        asked_support: see ``Sample.support``, by index in ``asked``, where the lane writes a blend.
        support: the same by row.
        device_seconds: see ``LaneReport.device_seconds``.
        regret: [rows + samples of ``asked``], or None for a lane without a regret artifact.
    """

    gate: list[list[float]] | None
    top_probability: list[float] | None
    asked: list[int]
    asked_logprobs: Any
    asked_support: dict[int, list[float]]
    support: dict[int, list[float]]
    device_seconds: float
    regret: list[float] | None = None

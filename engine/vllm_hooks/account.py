"""What a lane's step computed, for whom, and what its prefix cache saved."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from engine.lanes.interface import Computed
from engine.stats import LaneStats

if TYPE_CHECKING:
    from engine.vllm_hooks.guest import GuestLane


def account(
    scheduled: SchedulerOutput,
    requests: Mapping[str, Request],
    guest_rows: Mapping[str, tuple[GuestLane, str]],
    lane: int,
    scoring: Container[str] = (),
) -> list[Computed]:
    """What a step computed for each of its rows.

    Args:
        requests: by row, as they are after the step has been scheduled.
        guest_rows: the guest and the request's id, of rows that are a guest's.
        lane: number of the lane.
        scoring: rows that write nothing: all their tokens are the prompt's.
    """
    fresh = {new.req_id: new.num_computed_tokens for new in _arrived(scheduled, requests)}
    computed = []
    for row, tokens in scheduled.num_scheduled_tokens.items():
        request = requests[row]
        number, request_id = lane, row
        if guest_rows and (of := guest_rows.get(row)) is not None:
            number, request_id = of[0].number, of[1]
        length = request.num_tokens if row in scoring else request.num_prompt_tokens
        left = length - request.num_computed_tokens + tokens
        if left <= 0:
            # By far the most rows: one written token.
            computed.append(Computed(number, request_id, tokens))
        else:
            cached = min(fresh.get(row, 0), length)
            computed.append(Computed(number, request_id, tokens, min(tokens, left), cached))
    return computed


def _arrived(scheduled: SchedulerOutput, requests: Mapping[str, Request]) -> list[NewRequestData]:
    """Requests that are in their first step: to the V2 model runner those are new, too, that come back to the lane."""
    return [new for new in scheduled.scheduled_new_reqs if not requests[new.req_id].num_preemptions]


def count(
    stats: Mapping[int, LaneStats],
    computed: list[Computed],
    scheduled: SchedulerOutput,
    requests: Mapping[str, Request],
    *,
    caches: bool,
) -> None:
    """Add a step to the counters of those that it was for.

    Args:
        stats: by lane number: the lane's own, and its guests'.
        computed: from :func:`account`, in the order of the step's rows.
        caches: whether the lane has a prefix cache.
    """
    for lane, each in stats.items():
        own = computed if len(stats) == 1 else [row for row in computed if row.lane == lane]
        each.rows = len(own)
        each.computed_tokens += sum(row.tokens for row in own)
        each.prompt_tokens += sum(row.prompt_tokens for row in own)
    if not caches or not scheduled.scheduled_new_reqs:
        return
    lanes = {row: of.lane for row, of in zip(scheduled.num_scheduled_tokens, computed, strict=True)}
    for new in _arrived(scheduled, requests):
        each = stats[lanes[new.req_id]]
        each.cache_queries += requests[new.req_id].num_tokens
        each.cache_hits += new.num_computed_tokens

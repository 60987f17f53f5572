"""What a lane's step computed, for whom, and what its prefix cache saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from engine.lanes.interface import Computed
from engine.types import LaneStats

if TYPE_CHECKING:
    from engine.vllm_hooks.guest import GuestLane


class Part(NamedTuple):
    """A row's part in a step.

    Attributes:
        guest: whose row it is; None for the lane's own.
        looked_up: tokens that were looked up in the prefix cache, prompt and written ones.
        found: those of them that it had.
    """

    guest: GuestLane | None
    computed: Computed
    looked_up: int
    found: int


def parts(
    scheduled: SchedulerOutput,
    requests: Mapping[str, Request],
    guest_rows: Mapping[str, tuple[GuestLane, str]],
    lane: int,
) -> Iterator[Part]:
    """The parts of all rows in a step.

    Args:
        requests: by row, as they are after the step has been scheduled.
        guest_rows: the guest and the request's id, of rows that are a guest's.
        lane: number of the lane.
    """
    found = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    for row, tokens in scheduled.num_scheduled_tokens.items():
        request = requests[row]
        prompt = request.num_prompt_tokens
        begin = request.num_computed_tokens - tokens
        of_prompt = min(tokens, prompt - begin) if begin < prompt else 0
        hit = found.get(row)
        looked_up = 0 if hit is None else request.num_tokens
        guest, request_id = guest_rows.get(row) or (None, row)
        number = lane if guest is None else guest.number
        cached = min(hit, prompt) if hit else 0
        yield Part(guest, Computed(number, request_id, tokens, of_prompt, cached), looked_up, hit or 0)


def count(part: Part, stats: LaneStats, *, caches: bool) -> None:
    """Add a part to a lane's counters.

    Args:
        caches: whether the lane has a prefix cache.
    """
    stats.computed_tokens += part.computed.tokens
    stats.prompt_tokens += part.computed.prompt_tokens
    if caches:
        stats.cache_queries += part.looked_up
        stats.cache_hits += part.found

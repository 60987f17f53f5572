"""The engine's account of itself: counters and gauges, as they travel with each batch of deltas."""

from __future__ import annotations

import msgspec


class LaneStats(msgspec.Struct, array_like=True):
    """Counters (since start) and gauges (now) of one lane. Times in seconds.

    Attributes:
        steps: forward passes.
        step_seconds: their duration since the last report, one entry per step.
        rows: rows that were in the last step; 0 when the lane is idle.
        computed_tokens: positions computed, prompts included.
        catchup_tokens: written tokens computed beyond the one that a step needs anyway.
        requests: requests that hold a place in the lane.
        kv_usage: used share of the KV blocks, 0 to 1.
        up: False while a step of the lane is overdue.
        prompt_tokens: computed positions of prompts.
        cache_queries: tokens of requests that were looked up in the prefix cache.
        cache_hits: such tokens that it had.
        device_seconds: of all steps, what the device computed; the rest of their duration it waited for the host.
    """

    name: str
    steps: int = 0
    step_seconds: list[float] = []
    rows: int = 0
    computed_tokens: int = 0
    catchup_tokens: int = 0
    preemptions: int = 0
    requests: int = 0
    kv_usage: float = 0.0
    up: bool = True
    prompt_tokens: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    device_seconds: float = 0.0


class EngineStats(msgspec.Struct, array_like=True):
    """The engine's own account, sent with each batch of deltas.

    Attributes:
        running: admitted requests; waiting: those not admitted yet.
        loop_seconds: wall time since start during which the engine was not idle.
        step_seconds: the lanes' own step times, summed. In lockstep the difference is the coordination cost.
        expert_waits: for each deferral since the last report, seconds between parking and the expert's token.
        gate_errors: requests ended because the gate's value was not finite.
        integrity_errors: leftovers found in idle lanes; any but 0 is a defect.
        expert_failures: deferrals whose expert was lost, whatever became of their requests.
        runahead_accepted: tokens that the base drafted past a deferral and that stand.
        runahead_discarded: such tokens that do not.
        agreements: deferred positions at which the expert wrote what the base would have written.
        unaligned_deferrals: deferred positions that the base wrote, since no word began there for an expert of another
            vocabulary.
        vetoed: deferred positions that the base wrote, since the expert was not sure enough.
        regretted: deferred positions that the base wrote in the end, having read on behind the expert's token.
        revoked: tokens that were taken back so, before anybody was told of them: the experts' and those behind them.
    """

    lanes: list[LaneStats]
    running: int = 0
    waiting: int = 0
    loop_seconds: float = 0.0
    step_seconds: float = 0.0
    expert_waits: list[float] = []
    gate_errors: int = 0
    integrity_errors: int = 0
    expert_failures: int = 0
    runahead_accepted: int = 0
    runahead_discarded: int = 0
    agreements: int = 0
    unaligned_deferrals: int = 0
    vetoed: int = 0
    regretted: int = 0
    revoked: int = 0

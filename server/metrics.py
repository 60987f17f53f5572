"""Prometheus metrics, in a registry of their own: what dashboards and alerts rely on, under the contract's names.

Metrics of requests carry the model that was asked for; metrics of the engine carry the joint model's name.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from engine.stats import EngineStats
from engine.types import Delta, EngineInfo
from server import __version__
from server.meters import ALONE, LaneMeter, ModelMeter
from server.vllm_names import VllmNames

CONTENT_TYPE = CONTENT_TYPE_LATEST
_NO_PROCESS = "none"

_SHARES = tuple(step / 20 for step in range(21))
_RUNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
_STEPS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_TOKENS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_QUEUE = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_FIRST = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LENGTHS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_REQUESTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """All metrics of one server.

    Args:
        models: served names, the joint model's first.
        lane_names: "base" and the experts.
        vllm_names: export some metrics under vLLM's names too, see :mod:`server.vllm_names`.
    """

    def __init__(self, models: Sequence[str], lane_names: Sequence[str], *, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.lane_names = tuple(lane_names)
        self.joint = models[0]
        r = self.registry
        model = ["model_name"]
        lane = ["model_name", "lane"]
        self.tokens = Counter("collm_tokens", "Written tokens.", [*model, "source", "policy"], registry=r)
        self.prompt_tokens = Counter("collm_prompt_tokens", "Prompt tokens of served requests.", model, registry=r)
        self.requests = Counter(
            "collm_requests",
            "Generation requests (one per choice) by how they ended; rejected ones were not admitted.",
            [*model, "outcome"],
            registry=r,
        )
        self.running = Gauge("collm_requests_running", "Generation requests in the lanes.", model, registry=r)
        self.waiting = Gauge("collm_requests_waiting", "Generation requests not in the lanes yet.", model, registry=r)
        self.deferral_probability = Histogram(
            "collm_deferral_probability", "Deferral probability at each position.", model, buckets=_SHARES, registry=r
        )
        self.deferral_rate = Histogram(
            "collm_request_deferral_rate",
            "Expert tokens / tokens of a request.",
            [*model, "policy"],
            buckets=_SHARES,
            registry=r,
        )
        self.run_length = Histogram(
            "collm_deferral_run_length", "Expert tokens in a row.", model, buckets=_RUNS, registry=r
        )
        self.first_token = Histogram(
            "collm_time_to_first_token_seconds",
            "From the request to its first token.",
            model,
            buckets=_FIRST,
            registry=r,
        )
        self.inter_token = Histogram(
            "collm_inter_token_seconds", "Between tokens of a request.", model, buckets=_TOKENS, registry=r
        )
        self.request_seconds = Histogram(
            "collm_request_seconds", "From the request to its end.", model, buckets=_REQUESTS, registry=r
        )
        self.queue_seconds = Histogram(
            "collm_request_queue_seconds",
            "From a generation request's arrival at the engine to its admission to the lanes.",
            model,
            buckets=_QUEUE,
            registry=r,
        )
        self.request_prompt_tokens = Histogram(
            "collm_request_prompt_tokens", "Prompt tokens of a generation request.", model,
            buckets=_LENGTHS, registry=r,
        )  # fmt: skip
        self.request_generation_tokens = Histogram(
            "collm_request_generation_tokens", "Tokens that were written for a generation request.", model,
            buckets=_LENGTHS, registry=r,
        )  # fmt: skip
        self.running_limit = Gauge(
            "collm_max_requests_running", "Most generation requests in the lanes at once.", model, registry=r
        )
        self.waiting_limit = Gauge(
            "collm_max_requests_waiting", "Generation requests that may wait for a place there.", model, registry=r
        )
        self.step_seconds = Histogram(
            "collm_lane_step_seconds", "Duration of a lane's steps.", lane, buckets=_STEPS, registry=r
        )
        self.device_seconds = Counter(
            "collm_lane_device_seconds", "Of the lane's steps, what its device computed.", lane, registry=r
        )
        self.rows = Gauge("collm_lane_batch_rows", "Rows in the lane's last step.", lane, registry=r)
        self.catchup = Counter(
            "collm_lane_catchup_tokens", "Written tokens that a lane computed to catch up.", lane, registry=r
        )
        self.computed = Counter(
            "collm_lane_computed_tokens", "Positions that a lane computed, prompts included.", lane, registry=r
        )
        self.lane_prompt_tokens = Counter(
            "collm_lane_prompt_tokens", "Positions of prompts that a lane computed.", lane, registry=r
        )
        self.cache_queries = Counter(
            "collm_lane_prefix_cache_queries", "Tokens looked up in a lane's prefix cache.", lane, registry=r
        )
        self.cache_hits = Counter(
            "collm_lane_prefix_cache_hits", "Tokens that a lane's prefix cache had.", lane, registry=r
        )
        self.kv_tokens = Gauge("collm_lane_kv_cache_tokens", "Tokens that the KV blocks hold.", lane, registry=r)
        self.kv_usage = Gauge("collm_lane_kv_cache_usage_ratio", "Used share of the KV blocks.", lane, registry=r)
        self.preemptions = Counter("collm_lane_preemptions", "Preempted requests.", lane, registry=r)
        self.lane_up = Gauge("collm_lane_up", "1 while the lane can serve.", lane, registry=r)
        self.expert_wait = Histogram(
            "collm_expert_wait_seconds", "Between parking a request and the expert's token.", model,
            buckets=_STEPS, registry=r,
        )  # fmt: skip
        self.gate_errors = Counter(
            "collm_gate_errors", "Requests ended because the gate's value was not finite.", model, registry=r
        )
        self.expert_failures = Counter(
            "collm_expert_failures", "Deferrals whose expert was lost, whatever became of them.", model, registry=r
        )
        self.unaligned_deferrals = Counter(
            "collm_unaligned_deferrals",
            "Deferred positions that the base wrote, since no word began there for an expert of another vocabulary.",
            model,
            registry=r,
        )
        self.vetoed = Counter(
            "collm_vetoed_tokens", "Deferred positions that the base wrote, since the expert was not sure enough.",
            model, registry=r,
        )  # fmt: skip
        self.regretted = Counter(
            "collm_regretted_tokens",
            "Deferred positions that the base wrote in the end, having read on behind the expert's token.",
            model,
            registry=r,
        )
        self.revoked = Counter(
            "collm_revoked_tokens",
            "Tokens that were taken back so, the experts' and those behind them, before anybody was told of them.",
            model,
            registry=r,
        )
        self.integrity_errors = Counter(
            "collm_integrity_errors", "Leftovers found in idle lanes; any is a defect.", model, registry=r
        )
        self.runahead = Counter(
            "collm_runahead_tokens",
            "Tokens that the base looked at past a deferral, before the expert had written.",
            [*model, "result"],
            registry=r,
        )
        self.active_seconds = Counter(
            "collm_engine_active_seconds", "Time during which the engine was not idle.", model, registry=r
        )
        self.lane_seconds = Counter(
            "collm_engine_lane_seconds",
            "Time in the lanes' steps. In lockstep, what active seconds have beyond it is coordination.",
            model,
            registry=r,
        )
        self.http_requests = Counter(
            "collm_http_requests", "HTTP responses.", ["route", "method", "status"], registry=r
        )
        self.default_threshold = Gauge(
            "collm_default_threshold",
            "Threshold of requests that name none, for each policy that has one.",
            [*model, "policy"],
            registry=r,
        )
        self.build_info = Gauge("collm_build_info", "What is served.", ["version", "gate", "threshold"], registry=r)
        # Of the server's own process and of the engine's, where the operating system tells (Linux).
        ProcessCollector(registry=r)
        self._engine_pid: int | str = _NO_PROCESS
        ProcessCollector("collm_engine", lambda: self._engine_pid, registry=r)
        if vllm_names:
            r.register(VllmNames(self.joint, self.running, self.waiting, self.kv_usage))
        self._meters = {name: ModelMeter(self, name) for name in models}
        self._members = [f"{self.joint}/{name}" for name in lane_names]
        self._lanes = [LaneMeter(self, name) for name in lane_names]
        self._expert_wait = self.expert_wait.labels(self.joint)
        self._totals = [
            *(
                counter.labels(self.joint)
                for counter in (
                    self.gate_errors,
                    self.integrity_errors,
                    self.expert_failures,
                    self.unaligned_deferrals,
                    self.vetoed,
                    self.regretted,
                    self.revoked,
                )
            ),
            *(self.runahead.labels(self.joint, result) for result in ("accepted", "discarded")),
            *(counter.labels(self.joint) for counter in (self.active_seconds, self.lane_seconds)),
        ]
        self._seen_totals = [0.0] * len(self._totals)
        self.set_load(0, 0)

    def model(self, name: str) -> ModelMeter:
        """Metrics of one served model."""
        return self._meters[name]

    def engine_up(self, info: EngineInfo, pid: int) -> None:
        """The engine is ready; ``pid`` is its process."""
        self._engine_pid = pid
        gate = info.gate
        self.build_info.clear()
        self.build_info.labels(
            __version__, gate.source if gate else "none", "" if gate is None else f"{gate.threshold:g}"
        ).set(1)
        self.default_threshold.clear()
        for policy, threshold in info.thresholds.items():
            self.default_threshold.labels(self.joint, policy).set(threshold)
        self._seen_totals = [0.0] * len(self._totals)
        for lane, of in zip(self._lanes, info.lanes, strict=True):
            lane.restart(of.kv_blocks * of.block_size)
        # What will be asked for most begins at 0, not at its first use.
        for name, meter in self._meters.items():
            meter.policy(ALONE if name in self._members else info.policy)

    def engine_down(self) -> None:
        """The engine is gone; what it held is gone with it."""
        self._engine_pid = _NO_PROCESS
        for lane in self._lanes:
            lane.down()
        self.set_load(0, 0)

    def on_batch(self, _deltas: list[Delta], stats: EngineStats) -> None:
        """For ``Engine.on_batch``: counters and lists of the engine's account."""
        for lane, report in zip(self._lanes, stats.lanes, strict=True):
            lane.update(report)
        for seconds in stats.expert_waits:
            self._expert_wait.observe(seconds)
        totals = [
            stats.gate_errors,
            stats.integrity_errors,
            stats.expert_failures,
            stats.unaligned_deferrals,
            stats.vetoed,
            stats.regretted,
            stats.revoked,
            stats.runahead_accepted,
            stats.runahead_discarded,
            stats.loop_seconds,
            stats.step_seconds,
        ]
        for counter, now, seen in zip(self._totals, totals, self._seen_totals, strict=True):
            counter.inc(now - seen)
        self._seen_totals = totals

    def set_limits(self, running: int, waiting: int) -> None:
        """Most generation requests that may be in the lanes, and that may wait."""
        self.running_limit.labels(self.joint).set(running)
        self.waiting_limit.labels(self.joint).set(waiting)

    def set_load(self, running: int, waiting: int) -> None:
        """Set just before a scrape."""
        self.running.labels(self.joint).set(running)
        self.waiting.labels(self.joint).set(waiting)

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

"""Prometheus metrics, in a registry of their own: what dashboards and alerts rely on, under the contract's names.

Metrics of requests carry the model that was asked for; metrics of the engine carry the joint model's name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from engine.types import BASE, Delta, EngineInfo, EngineStats
from server import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST
OUTCOMES = ("stop", "length", "aborted", "error", "rejected")

_SHARES = tuple(step / 20 for step in range(21))
_RUNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
_STEPS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_TOKENS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_FIRST = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_REQUESTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """All metrics of one server.

    Args:
        models: served names, the joint model's first.
        lane_names: "base" and the experts.
    """

    def __init__(self, models: Sequence[str], lane_names: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self.lane_names = tuple(lane_names)
        self.joint = models[0]
        r = self.registry
        model = ["model_name"]
        lane = ["model_name", "lane"]
        self.tokens = Counter("collm_tokens", "Written tokens.", [*model, "source"], registry=r)
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
            "collm_request_deferral_rate", "Expert tokens / tokens of a request.", model, buckets=_SHARES, registry=r
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
        self.step_seconds = Histogram(
            "collm_lane_step_seconds", "Duration of a lane's steps.", lane, buckets=_STEPS, registry=r
        )
        self.rows = Gauge("collm_lane_batch_rows", "Rows in the lane's last step.", lane, registry=r)
        self.catchup = Counter(
            "collm_lane_catchup_tokens", "Written tokens that a lane computed to catch up.", lane, registry=r
        )
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
        self.integrity_errors = Counter(
            "collm_integrity_errors", "Leftovers found in idle lanes; any is a defect.", model, registry=r
        )
        self.runahead = Counter(
            "collm_runahead_tokens",
            "Tokens that the base looked at past a deferral, before the expert had written.",
            [*model, "result"],
            registry=r,
        )
        self.http_requests = Counter(
            "collm_http_requests", "HTTP responses.", ["route", "method", "status"], registry=r
        )
        self.build_info = Gauge("collm_build_info", "What is served.", ["version", "gate", "threshold"], registry=r)
        self._meters = {name: ModelMeter(self, name) for name in models}
        self._lanes = [_LaneMeter(self, name) for name in lane_names]
        self._expert_wait = self.expert_wait.labels(self.joint)
        self._totals = [
            *(
                counter.labels(self.joint)
                for counter in (self.gate_errors, self.integrity_errors, self.expert_failures)
            ),
            *(self.runahead.labels(self.joint, result) for result in ("accepted", "discarded")),
        ]
        self._seen_totals = [0] * len(self._totals)
        self.set_load(0, 0)

    def model(self, name: str) -> ModelMeter:
        """Metrics of one served model."""
        return self._meters[name]

    def engine_up(self, info: EngineInfo) -> None:
        """The engine is ready."""
        gate = info.gate
        self.build_info.clear()
        self.build_info.labels(
            __version__, gate.source if gate else "none", "" if gate is None else f"{gate.threshold:g}"
        ).set(1)
        self._seen_totals = [0] * len(self._totals)
        for lane in self._lanes:
            lane.restart()

    def engine_down(self) -> None:
        """The engine is gone; what it held is gone with it."""
        for lane in self._lanes:
            lane.down()
        self.set_load(0, 0)

    def on_batch(self, _deltas: list[Delta], stats: EngineStats) -> None:
        """For ``Engine.on_batch``: counters and lists of the engine's account."""
        for lane, report in zip(self._lanes, stats.lanes, strict=True):
            lane.set_up(report.up)
            lane.update(report.step_seconds, report.rows, report.catchup_tokens, report.preemptions, report.kv_usage)
        for seconds in stats.expert_waits:
            self._expert_wait.observe(seconds)
        totals = [
            stats.gate_errors,
            stats.integrity_errors,
            stats.expert_failures,
            stats.runahead_accepted,
            stats.runahead_discarded,
        ]
        for counter, now, seen in zip(self._totals, totals, self._seen_totals, strict=True):
            counter.inc(now - seen)
        self._seen_totals = totals

    def set_load(self, running: int, waiting: int) -> None:
        """Set just before a scrape."""
        self.running.labels(self.joint).set(running)
        self.waiting.labels(self.joint).set(waiting)

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class ModelMeter:
    """The metrics of one model, with their labels bound once: this is the per-token path."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        # Blended tokens have the source -1.
        self.tokens = [metrics.tokens.labels(name, source) for source in (*metrics.lane_names, "blend")]
        self.prompt_tokens = metrics.prompt_tokens.labels(name)
        self.outcomes = {outcome: metrics.requests.labels(name, outcome) for outcome in OUTCOMES}
        self.deferral_probability = metrics.deferral_probability.labels(name)
        self.deferral_rate = metrics.deferral_rate.labels(name)
        self.run_length = metrics.run_length.labels(name)
        self.first_token = metrics.first_token.labels(name)
        self.inter_token = metrics.inter_token.labels(name)
        self.request_seconds = metrics.request_seconds.labels(name)


class RequestMeter:
    """Accounts for one generation request from its submission to its end.

    Args:
        model: of the model that was asked for.
        joint: whether more than one lane may write, so that a deferral rate means something.
        started: ``time.perf_counter()`` when the HTTP request arrived.
    """

    __slots__ = ("_experts", "_joint", "_last", "_model", "_run", "_started", "_written")

    def __init__(self, model: ModelMeter, *, joint: bool, started: float) -> None:
        self._model = model
        self._joint = joint
        self._started = started
        self._last: float | None = None
        self._written = 0
        self._experts = 0
        self._run = 0

    def arrived(self, tokens: int) -> None:
        """The engine delivered so many tokens."""
        if not tokens:
            return
        now = time.perf_counter()
        model = self._model
        if self._last is None:
            # Of tokens that came together with the first one, no time between them is known.
            model.first_token.observe(now - self._started)
        else:
            each = (now - self._last) / tokens
            for _ in range(tokens):
                model.inter_token.observe(each)
        self._last = now

    def wrote(self, sources: Sequence[int], deferrals: Sequence[float | None]) -> None:
        """So many tokens became part of the answer."""
        model = self._model
        for source, deferral in zip(sources, deferrals, strict=True):
            model.tokens[source].inc()
            if deferral is not None:
                model.deferral_probability.observe(deferral)
            if source != BASE:
                self._experts += 1
                self._run += 1
            elif self._run:
                self._end_run()
        self._written += len(sources)

    def end(self, outcome: str) -> None:
        """The request ended; one of ``OUTCOMES``."""
        model = self._model
        model.outcomes[outcome].inc()
        model.request_seconds.observe(time.perf_counter() - self._started)
        if self._joint and self._written:
            model.deferral_rate.observe(self._experts / self._written)
        if self._run:
            self._end_run()

    def _end_run(self) -> None:
        if self._joint:
            self._model.run_length.observe(self._run)
        self._run = 0


class _LaneMeter:
    """The metrics of one lane. The engine reports totals since its start; counters take their increments."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        labels = (metrics.joint, name)
        self._step_seconds = metrics.step_seconds.labels(*labels)
        self._rows = metrics.rows.labels(*labels)
        self._catchup = metrics.catchup.labels(*labels)
        self._kv_usage = metrics.kv_usage.labels(*labels)
        self._preemptions = metrics.preemptions.labels(*labels)
        self._up = metrics.lane_up.labels(*labels)
        self._seen_catchup = 0
        self._seen_preemptions = 0

    def restart(self) -> None:
        self._seen_catchup = self._seen_preemptions = 0
        self._up.set(1)

    def set_up(self, up: bool) -> None:
        self._up.set(up)

    def down(self) -> None:
        for gauge in (self._up, self._rows, self._kv_usage):
            gauge.set(0)

    def update(self, step_seconds: Sequence[float], rows: int, catchup: int, preemptions: int, kv_usage: float) -> None:
        for seconds in step_seconds:
            self._step_seconds.observe(seconds)
        self._rows.set(rows)
        self._kv_usage.set(kv_usage)
        self._catchup.inc(catchup - self._seen_catchup)
        self._preemptions.inc(preemptions - self._seen_preemptions)
        self._seen_catchup, self._seen_preemptions = catchup, preemptions

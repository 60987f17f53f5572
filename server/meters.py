"""What counts for one model, one request and one lane, with labels bound once: this is the per-token path."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from engine.stats import LaneStats
from engine.types import BASE, Collaboration, Cost

Metrics = Any
"""``server.metrics.Metrics``, which stands above this module."""

OUTCOMES = ("stop", "length", "aborted", "error", "rejected")
ALONE = "alone"
"""Stands for the policy where one member writes everything."""


class PolicyMeter:
    """The metrics of one model's requests under one policy."""

    def __init__(self, metrics: Metrics, model: str, policy: str) -> None:
        # Blended tokens have the source -1.
        self.tokens = [metrics.tokens.labels(model, source, policy) for source in (*metrics.lane_names, "blend")]
        self.deferral_rate = metrics.deferral_rate.labels(model, policy)


class ModelMeter:
    """The metrics of one model."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self._policies: dict[str, PolicyMeter] = {}
        self.prompt_tokens = metrics.prompt_tokens.labels(name)
        self.outcomes = {outcome: metrics.requests.labels(name, outcome) for outcome in OUTCOMES}
        self.deferral_probability = metrics.deferral_probability.labels(name)
        self.run_length = metrics.run_length.labels(name)
        self.first_token = metrics.first_token.labels(name)
        self.inter_token = metrics.inter_token.labels(name)
        self.request_seconds = metrics.request_seconds.labels(name)
        self.queue_seconds = metrics.queue_seconds.labels(name)
        self.request_prompt_tokens = metrics.request_prompt_tokens.labels(name)
        self.request_generation_tokens = metrics.request_generation_tokens.labels(name)

    def policy(self, name: str) -> PolicyMeter:
        """The metrics of requests under a policy; from the first time on that it is asked for, they are exported."""
        meter = self._policies.get(name)
        if meter is None:
            meter = self._policies[name] = PolicyMeter(self._metrics, self._name, name)
        return meter


class RequestMeter:
    """Accounts for one generation request from its submission to its end.

    Args:
        model: of the model that was asked for.
        joint: whether more than one lane may write, so that a deferral rate means something.
        prompt_tokens: of its prompt.
        started: ``time.perf_counter()`` when the HTTP request arrived.
    """

    __slots__ = (
        "_cost",
        "_experts",
        "_joint",
        "_last",
        "_model",
        "_policy",
        "_prompt_tokens",
        "_run",
        "_started",
        "_written",
    )

    def __init__(self, model: ModelMeter, *, joint: bool, started: float, prompt_tokens: int = 0) -> None:
        self._model = model
        self._joint = joint
        self._started = started
        self._prompt_tokens = prompt_tokens
        self._policy: PolicyMeter | None = None
        self._cost: Cost | None = None
        self._last: float | None = None
        self._written = 0
        self._experts = 0
        self._run = 0

    def accepted(self, collaboration: Collaboration) -> None:
        """The engine has taken the request, and this is in force."""
        policy = collaboration.policy if self._joint else None
        self._policy = self._model.policy(policy or ALONE)

    def charged(self, cost: Cost) -> None:
        """What it has taken so far."""
        self._cost = cost

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
        if not sources:
            return
        model, policy = self._model, self._policy
        if policy is None:
            policy = self._policy = model.policy(ALONE)
        for source, deferral in zip(sources, deferrals, strict=True):
            policy.tokens[source].inc()
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
        if outcome != "rejected":
            model.request_prompt_tokens.observe(self._prompt_tokens)
            model.request_generation_tokens.observe(self._written)
        if self._cost is not None:
            model.queue_seconds.observe(self._cost.queue_seconds)
        if self._joint and self._written and self._policy is not None:
            self._policy.deferral_rate.observe(self._experts / self._written)
        if self._run:
            self._end_run()

    def _end_run(self) -> None:
        if self._joint:
            self._model.run_length.observe(self._run)
        self._run = 0


class LaneMeter:
    """The metrics of one lane. The engine reports totals since its start; counters take their increments."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        labels = (metrics.joint, name)
        self._step_seconds = metrics.step_seconds.labels(*labels)
        self._rows = metrics.rows.labels(*labels)
        self._kv_usage = metrics.kv_usage.labels(*labels)
        self._kv_tokens = metrics.kv_tokens.labels(*labels)
        self._up = metrics.lane_up.labels(*labels)
        self._counters = {
            name: counter.labels(*labels)
            for name, counter in (
                ("computed_tokens", metrics.computed),
                ("prompt_tokens", metrics.lane_prompt_tokens),
                ("catchup_tokens", metrics.catchup),
                ("preemptions", metrics.preemptions),
                ("cache_queries", metrics.cache_queries),
                ("cache_hits", metrics.cache_hits),
                ("device_seconds", metrics.device_seconds),
            )
        }
        self._seen: dict[str, float] = dict.fromkeys(self._counters, 0)

    def restart(self, kv_tokens: int) -> None:
        """The lane is ready, and counts from 0. Its KV cache holds so many tokens."""
        self._seen = dict.fromkeys(self._counters, 0)
        self._kv_tokens.set(kv_tokens)
        self._up.set(1)

    def down(self) -> None:
        """The lane is gone."""
        for gauge in (self._up, self._rows, self._kv_usage):
            gauge.set(0)

    def update(self, report: LaneStats) -> None:
        """Take in what the lane reports."""
        self._up.set(report.up)
        for seconds in report.step_seconds:
            self._step_seconds.observe(seconds)
        self._rows.set(report.rows)
        self._kv_usage.set(report.kv_usage)
        for name, counter in self._counters.items():
            now: float = getattr(report, name)
            counter.inc(now - self._seen[name])
            self._seen[name] = now

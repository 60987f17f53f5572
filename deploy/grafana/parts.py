"""What panels are described with: the types, and the PromQL that many of them need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HERE = 'job=~"$job", instance=~"$instance"'
JOINT = HERE + ', model_name=~"$model"'
"""The joint model, which has lanes and a gate."""
ANY = HERE + ', model_name=~"$model(/.+)?"'
"""The joint model and its members served alone, NAME/base and NAME/EXPERT."""

TOKENS = "suffix: tok/s"
QUANTILES = (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))


@dataclass(frozen=True)
class Query:
    """One PromQL query of a panel.

    Attributes:
        instant: only the value at the end of the time range.
        shape: what Grafana makes of the answer.
    """

    expr: str
    legend: str = ""
    instant: bool = False
    shape: str = "time_series"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind: Grafana's panel type.
        unit: Grafana's name of the unit; ``suffix:`` gives one of our own.
        size: columns (of 24) and grid rows.
        options: added to the panel type's options below.
        custom: added to ``fieldConfig.defaults``.
        overrides: ``fieldConfig.overrides``.
    """

    id: int
    kind: str
    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    size: tuple[int, int] = (8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    custom: dict[str, Any] = field(default_factory=dict)
    overrides: Sequence[dict[str, Any]] = ()
    transformations: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Row:
    """A titled row; its panels flow from left to right and wrap."""

    id: int
    title: str
    panels: Sequence[Panel]


def rate(metric: str, labels: str, *by: str) -> str:
    """Increase a second, summed by these labels."""
    return f"sum by ({', '.join(by)}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def ratio(part: str, whole: str, matching: str = "") -> str:
    """A quotient that has no value where the whole is 0, instead of NaN."""
    return f"{part} /{matching} ({whole} > 0)"


def quantiles(metric: str, labels: str, *by: str) -> list[Query]:
    """p50, p95 and p99 of a histogram."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return [
        Query(
            f"histogram_quantile({quantile}, {rate(f'{metric}_bucket', labels, 'le', *by)})",
            f"{legend} {name}".strip(),
        )
        for quantile, name in QUANTILES
    ]


def distribution(metric: str) -> list[Query]:
    """How many observations of the whole time range fell into each bucket."""
    return [
        Query(f"sum by (le) (increase({metric}_bucket{{{JOINT}}}[$__range]))", "{{le}}", instant=True, shape="heatmap")
    ]


def deferral(*by: str) -> str:
    """Expert tokens / tokens."""
    experts = JOINT + ', source!="base"'
    return ratio(rate("collm_tokens_total", experts, *by), rate("collm_tokens_total", JOINT, *by))


def outcomes(outcome: str, legend: str) -> Query:
    """Requests a second that ended so."""
    return Query(rate("collm_requests_total", f'{ANY}, outcome="{outcome}"', "model_name"), legend)

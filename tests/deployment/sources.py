"""What is shipped for observing: the dashboard's and the rules' queries, the server's metrics, Debian's tools."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from engine.stats import EngineStats, LaneStats
from engine.types import EngineInfo, LaneInfo
from server.metrics import Metrics
from tests.packaging.sources import ROOT

PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


@functools.cache
def tool(command: str) -> str | None:
    """A program of Debian's package ``prometheus``: installed where that is missing and may be done."""
    if (path := shutil.which(command)) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        # RUNLEVEL=1: the package brings a service, which is not to be started.
        environment = {**os.environ, "RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
        command_line = ["apt-get", "-qq", "install", "--no-install-recommends", "prometheus"]
        subprocess.run(command_line, env=environment, capture_output=True, timeout=300, check=False)
        path = shutil.which(command)
    return path


def need(command: str) -> str:
    """The path of a program of Debian's package ``prometheus``; skips the test where it cannot be had."""
    path = tool(command)
    if path is None:
        pytest.skip(f"no {command} here, and it could not be installed (Debian's package prometheus)")
    return path


def dashboard() -> dict[str, Any]:
    """The dashboard, as it is committed."""
    return json.loads((GRAFANA / "dashboards/deferral.json").read_text("utf-8"))  # type: ignore[no-any-return]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels without its rows; those of rows that are collapsed stand in these."""
    return [panel for group in panel_groups() for panel in group if panel["type"] != "row"]


def panel_groups() -> list[list[dict[str, Any]]]:
    """What is seen together: what no row hides, then the panels of each collapsed row."""
    top = dashboard()["panels"]
    return [top, *(panel["panels"] for panel in top if panel["type"] == "row" and panel["collapsed"])]


@dataclass(frozen=True)
class ShippedQuery:
    """A query of a panel or of a rule."""

    where: str
    expr: str


def rules() -> list[dict[str, Any]]:
    """All rules, recording and alerting."""
    return [
        rule
        for path in RULE_FILES
        for group in yaml.safe_load(path.read_text("utf-8"))["groups"]
        for rule in group["rules"]
    ]


def panel_queries() -> list[ShippedQuery]:
    """Every query of every panel."""
    return [
        ShippedQuery(f"panel {panel['title']!r} {target['refId']}", target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]


def rule_queries() -> list[ShippedQuery]:
    """Every rule's query."""
    return [
        ShippedQuery(f"rule {rule.get('alert') or rule['record']} {position}", rule["expr"])
        for position, rule in enumerate(rules())
    ]


@functools.cache
def server_series() -> dict[str, dict[str, set[str]]]:
    """What a server exports: series name -> label -> values seen. Of a pair that has served nothing yet."""
    metrics = Metrics(["m", "m/base", "m/law"], ["base", "law"])
    lanes = [LaneInfo(name, name, 256, 64, 16) for name in ("base", "law")]
    info = EngineInfo(lanes, 512, 256, [0], "lockstep", None, {}, "threshold", {"threshold": 0.5})
    metrics.engine_up(info, os.getpid())
    metrics.set_limits(8, 64)
    metrics.on_batch([], EngineStats([LaneStats("base"), LaneStats("law")]))
    metrics.set_load(0, 0)
    metrics.http_requests.labels("/v1/completions", "POST", "200")
    found: dict[str, dict[str, set[str]]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return found


def recorded() -> set[str]:
    """Names that recording rules make."""
    return {rule["record"] for rule in rules() if "record" in rule}


def grafana_quote(value: str) -> str:
    """A variable's value as Grafana writes it into a regular expression in PromQL."""
    special = "\\^$*+?.()|[]{}"
    return "".join("\\\\" + character if character in special else character for character in value)

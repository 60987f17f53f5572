"""Every query of the dashboard and of the rules, run by a real Prometheus that scrapes a live server under load."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.deploy.live import MODEL, Load, Prometheus, prometheus, served, wait_until
from tests.deploy.promql import selectors
from tests.deploy.sources import ShippedQuery, dashboard, grafana_quote, need, panel_queries, rules

pytestmark = pytest.mark.slow

ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = sorted({rule["record"] for rule in rules() if "record" in rule})


@dataclass
class Live:
    """The scene: a server, its Prometheus, and the load."""

    address: str
    prometheus: Prometheus
    load: Load

    def filled(self, expr: str) -> str:
        """A panel's query as Grafana would send it, with one value chosen for each variable."""
        instance = self.address.removeprefix("http://")
        [threshold] = {labels["threshold"] for labels, _ in self.prometheus.query("collm_build_info")}
        values = {
            "job": "collm",
            "model": grafana_quote(MODEL),
            "instance": grafana_quote(instance),
            "threshold": threshold,
            "__rate_interval": "10s",
            "__range": "60s",
        }
        return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], expr)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    need("prometheus")
    folder = tmp_path_factory.mktemp("live")
    with (
        served(folder) as address,
        prometheus(folder, address.removeprefix("http://")) as found,
        Load(address) as load,
    ):
        scene = Live(address, found, load)
        wait_until("all targets are scraped", lambda: [t["health"] for t in found.targets()] == ["up", "up"])
        # Two scrapes give a rate; the load needs some seconds to have shown each of its kinds.
        wait_until("requests are given up", lambda: bool(found.query('collm_requests_total{outcome="aborted"} > 3')))
        wait_until("requests are rejected", lambda: bool(found.query('collm_requests_total{outcome="rejected"} > 0')))
        wait_until("an objective is recorded", lambda: bool(found.query("job_model:collm_too_slow:ratio_rate6h")))
        wait_until("a drift base is recorded", lambda: bool(found.query("job_model:collm_deferral:ratio_rate1h")))
        yield scene


def finite(found: list[tuple[dict[str, str], float]]) -> list[float]:
    return [value for _, value in found if math.isfinite(value)]


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.where)
def test_panel_has_data(live: Live, query: ShippedQuery) -> None:
    expr = live.filled(query.expr)
    assert "$" not in expr.replace('$"', "")
    # A second look, for a window in which a rare event did not happen.
    found: list[float] = []

    def look() -> bool:
        found[:] = finite(live.prometheus.query(expr))
        return bool(found)

    wait_until(f"{expr} has data", look, 20)
    unit_interval = re.search(r"/ ?(on \(\w+\) group_left \(\) )?\(", query.expr) or "histogram_quantile" in query.expr
    if unit_interval and "_seconds" not in query.expr:
        assert all(0 <= value <= 1 for value in found)


@pytest.mark.parametrize("variable", ["job", "model", "instance", "threshold"])
def test_variable_has_values(live: Live, variable: str) -> None:
    [definition] = [item["definition"] for item in dashboard()["templating"]["list"] if item["name"] == variable]
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", definition)
    assert match is not None
    expr, label = live.filled(match[1]), match[2]
    assert {labels.get(label) for labels, _ in live.prometheus.query(expr)} - {None, ""}


def test_annotations_are_taken(live: Live) -> None:
    for annotation in dashboard()["annotations"]["list"]:
        live.prometheus.query(live.filled(annotation["expr"]))


def test_rules_are_healthy(live: Live) -> None:
    loaded = live.prometheus.rules()
    assert len(loaded) == len(rules())
    wait_until("all rules have run", lambda: all(rule["health"] != "unknown" for rule in live.prometheus.rules()))
    bad = [(rule["name"], rule["lastError"]) for rule in live.prometheus.rules() if rule["health"] != "ok"]
    assert bad == []


@pytest.mark.parametrize("name", RECORDED)
def test_recording_rule_has_data(live: Live, name: str) -> None:
    assert finite(live.prometheus.query(name))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_looks_at_what_is_there(live: Live, alert: dict[str, str]) -> None:
    """A healthy server fires nothing, so it is what the alert compares that must be there."""
    live.prometheus.query(alert["expr"])
    for selector in selectors(alert["expr"]):
        assert finite(live.prometheus.query(selector.text)), f"{selector.text} has no series"


def test_members_alone_are_not_deferral(live: Live) -> None:
    """The expert served alone writes everything, and is in no deferral rate."""
    assert live.prometheus.query(f'collm_tokens_total{{model_name="{MODEL}/codes", source="codes"}} > 0')
    found = live.prometheus.query("instance_model:collm_deferral:ratio_rate15m")
    assert [labels["model_name"] for labels, _ in found] == [MODEL]
    assert 0.1 < found[0][1] < 0.9


def test_load_was_of_every_kind(live: Live) -> None:
    assert {0, 200, 400, 429} <= set(live.load.statuses)
    assert set(live.load.statuses) <= {0, 200, 400, 429}


def test_metrics_are_well_formed(live: Live) -> None:
    text = httpx.get(f"{live.address}/metrics", timeout=20).text
    command = [need("promtool"), "check", "metrics"]
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")

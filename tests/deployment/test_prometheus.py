"""Prometheus' configuration and rules: accepted by promtool, tested with series, in line with the server's metrics."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deployment.promql import counted, grouping_labels, selectors, unguarded_divisions
from tests.deployment.sources import (
    PROMETHEUS,
    RULE_FILES,
    RULE_TESTS,
    ShippedQuery,
    dashboard,
    need,
    panel_queries,
    recorded,
    rule_queries,
    rules,
    server_series,
)
from tests.packaging.sources import ROOT

ALERTS = [rule for rule in rules() if "alert" in rule]
CHOICES = {
    variable["name"]: {option["value"] for option in variable["options"]}
    for variable in dashboard()["templating"]["list"]
    if variable["type"] == "custom"
}
"""The values of dashboard variables that a user picks from a list."""
QUERIES = [*panel_queries(), *rule_queries()]
OF_PROMETHEUS = frozenset({"up"})
"""Metrics that Prometheus makes itself."""
HAPPENED_ONCE = ("CollmGateNotFinite", "CollmLaneFlapping", "CollmIntegrityErrors")
"""Alerts for which once is enough; everything else has to last."""


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [need("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_config_is_accepted() -> None:
    result = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert result.returncode == 0, result.stderr
    assert f"{len(RULE_FILES)} rule files found" in result.stdout


@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.name)
def test_rules_are_accepted(path: Path) -> None:
    result = promtool("check", "rules", "--lint=all", "--lint-fatal", path)
    assert result.returncode == 0, result.stderr + result.stdout


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.name)
def test_rules_do_what_they_should(path: Path) -> None:
    result = promtool("test", "rules", path)
    assert result.returncode == 0, result.stderr + result.stdout


def test_rule_tests_can_fail(tmp_path: Path) -> None:
    """With the thresholds moved out of reach, the tests notice: each alert has series that must fire it."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "tests").mkdir()
    for path in RULE_FILES:
        content = yaml.safe_load(path.read_text())
        for group in content["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    rule["expr"] = f"({rule['expr']}) and on () vector(1) > 2"
        (tmp_path / "rules" / path.name).write_text(yaml.safe_dump(content))
    silent = set()
    for path in RULE_TESTS:
        copy = tmp_path / "tests" / path.name
        copy.write_text(path.read_text())
        silent |= set(re.findall(r"alertname: ?(Collm\w+)", promtool("test", "rules", copy).stderr))
    assert silent == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_is_tested_both_ways(alert: dict[str, Any]) -> None:
    cases = [
        case
        for path in RULE_TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert["alert"]
    ]
    assert any(case["exp_alerts"] for case in cases), "no series that fires it"
    assert any(not case["exp_alerts"] for case in cases), "no series that doesn't"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert ("for" in alert) == (alert["alert"] not in HAPPENED_ONCE)
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert all(text.strip() for text in annotations.values())
    file, anchor = runbook(alert)
    assert anchor in anchors((ROOT / file).read_text("utf-8"))


def runbook(alert: dict[str, Any]) -> tuple[str, str]:
    """The file and its heading's anchor that an alert links to."""
    path = alert["annotations"]["runbook_url"].removeprefix("{{ $externalLabels.collm_docs }}")
    file, _, anchor = path.partition("#")
    return file, anchor


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", markdown, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_runbooks_are_all_used() -> None:
    used = {runbook(alert)[1] for alert in ALERTS}
    headings = re.findall(r"^## +(.+?) *$", (ROOT / "docs/runbooks.md").read_text("utf-8"), re.M)
    assert anchors("\n".join(f"## {heading}" for heading in headings)) == used


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_query_fits_the_servers_metrics(query: ShippedQuery) -> None:
    exported = server_series()
    for selector in selectors(query.expr):
        if selector.metric in recorded() | OF_PROMETHEUS:
            continue
        assert selector.metric in exported, f"{selector.metric} is not exported by the server"
        labels = exported[selector.metric]
        for label, operator, value in selector.matchers:
            assert label in {"job", "instance", *labels}, f"{selector.metric} has no label {label}"
            if operator in ("=", "!=") and label in ("le", "lane", "source", "outcome", "result"):
                values = CHOICES.get(value.removeprefix("$"), {value})
                assert values <= labels[label], f"{selector.metric} has no {label}={value!r}"
    known = {label for labels in exported.values() for label in labels} | {"job", "instance"}
    assert grouping_labels(query.expr) <= known


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_rates_are_of_counters(query: ShippedQuery) -> None:
    for metric in counted(query.expr):
        assert metric.endswith(("_total", "_bucket", "_sum", "_count")), metric


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_divisions_are_guarded(query: ShippedQuery) -> None:
    assert unguarded_divisions(query.expr) == []


def test_the_checks_can_fail() -> None:
    names = [
        selector.metric for selector in selectors('sum by (le) (rate(a{x="{y}"}[5m])) / on (job) (b offset 1d > 0)')
    ]
    assert names == ["a", "b"]
    assert selectors('a{le="1", x!~"y"}')[0].matchers == (("le", "=", "1"), ("x", "!~", "y"))
    assert unguarded_divisions("a / b")
    assert unguarded_divisions("a / (b)")
    assert unguarded_divisions("a / on (job) group_left () sum(b > 0)")
    assert unguarded_divisions('a{x="/"} / on (job) group_left () (sum(b) > 0)') == []
    assert list(counted("rate(a[5m]) + increase( b{c='d'}[1m])")) == ["a", "b"]
    assert "gate-not-finite" in anchors("# A\n\n## Gate not finite\n")


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {selector.metric for query in panel_queries() for selector in selectors(query.expr)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in server_series()}
    missing = families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    # What every Python process exports is looked up where it is needed.
    assert {name for name in missing if not re.match(r"(collm_engine_)?process_", name)} == set()

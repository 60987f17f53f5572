"""The dashboard: Grafana knows every field of it, and it keeps to the house's habits."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import yaml

from tests.deployment.promql import selectors
from tests.deployment.sources import GRAFANA, dashboard, panel_groups, panels
from tests.packaging.sources import ROOT

PANELS = panels()
BEYOND_THE_SCHEMA = {
    # What Grafana's Prometheus data source adds to annotations, and the editor's copy of a variable's query.
    "annotations.list[].titleFormat", "annotations.list[].textFormat", "annotations.list[].tagKeys",
    "templating.list[].definition",
}  # fmt: skip
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def lost_in_the_schema(board: dict[str, Any]) -> set[str]:
    """Paths of what does not survive Grafana's own data model: fields that it does not know, values that it changes.

    Fields of panel options, field configurations and queries are those of their panel type and data source.
    """
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    known = json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(board))))

    def differences(ours: Any, theirs: Any, path: str) -> Iterator[str]:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for name, value in ours.items():
                yield from differences(value, theirs.get(name, ...), f"{path}.{name}" if path else name)
        elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
            for value, other in zip(ours, theirs, strict=True):
                yield from differences(value, other, f"{path}[]")
        elif ours != theirs:
            yield path

    return set(differences(board, known, ""))


def test_grafana_knows_every_field() -> None:
    assert lost_in_the_schema(dashboard()) == BEYOND_THE_SCHEMA


@pytest.mark.parametrize("kind", sorted({panel["type"] for panel in PANELS}))
@pytest.mark.parametrize("place", ["", "options", "fieldConfig.defaults"])
def test_fields_that_grafana_does_not_know_are_found(kind: str, place: str) -> None:
    board = dashboard()
    top = board["panels"]
    everywhere = [*top, *(panel for row in top for panel in row.get("panels", ()))]
    node = next(panel for panel in everywhere if panel["type"] == kind)
    nested = node not in top
    for name in filter(None, place.split(".")):
        node = node[name]
    node["colourMode"] = "value"
    path = ".".join(filter(None, ["panels[]", "panels[]" if nested else "", place, "colourMode"]))
    assert lost_in_the_schema(board) == BEYOND_THE_SCHEMA | {path}


def test_identity_is_fixed() -> None:
    board = dashboard()
    assert board["uid"] == "collm-deferral"
    assert board["title"] == "Deferral"
    assert "id" not in board
    ids = [panel["id"] for group in panel_groups() for panel in group]
    assert len(ids) == len(set(ids))
    assert all(isinstance(number, int) and number > 0 for number in ids)


def test_ids_are_stable() -> None:
    """Links refer to these: a panel may be added here, none may change its number."""
    expected = {1: "Deferral rate now", 6: "Deferral rate by model", 13: "Tokens per second by source"}
    expected |= {22: "Time to first token", 27: "Rejected, aborted, failed", 31: "Build and gate"}
    titles = {panel["id"]: panel["title"] for panel in PANELS}
    assert {number: titles[number] for number in expected} == expected


def test_titles_are_unique() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len(set(titles))


def test_variables() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert list(variables)[:4] == ["datasource", "job", "model", "instance"]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "model", "instance"):
        assert variables[name]["datasource"] == DATASOURCE
        assert variables[name]["includeAll"]
        assert variables[name]["multi"]


def test_the_first_screen_has_deferral_latency_and_errors() -> None:
    """About twenty units of height are seen at once; what comes after them is collapsed."""
    first, *hidden = panel_groups()
    seen = {panel["title"] for panel in first if panel["gridPos"]["y"] < 13}
    assert seen >= {"Deferral rate now", "Deferral rate by model", "Time to first token", "Share that fails"}
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in first if panel["type"] != "row") <= 21
    assert len(hidden) == sum(panel["type"] == "row" for panel in first) - 1


@pytest.mark.parametrize("group", panel_groups(), ids=lambda group: group[0]["title"])
def test_panels_do_not_overlap(group: list[dict[str, Any]]) -> None:
    boxes = [(panel["title"], panel["gridPos"]) for panel in group]
    for _, box in boxes:
        assert box["x"] + box["w"] <= 24
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_keeps_to_the_habits(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == DATASOURCE
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        for selector in selectors(target["expr"]):
            # Without _bucket and the like, as the reference names it.
            name = re.sub(r"_(bucket|sum|count)$", "", selector.metric)
            assert name in panel["description"], f"the description does not name {name}"
            matchers = {(label, operator, value) for label, operator, value in selector.matchers}
            assert {("job", "=~", "$job"), ("instance", "=~", "$instance")} <= matchers
        assert set(re.findall(r"\[([^\]]*)\]", target["expr"])) <= {"$__rate_interval", "$__range"}


def test_nothing_is_hard_coded() -> None:
    text = json.dumps(dashboard())
    assert re.search(r'job=~?\\"(?!\$job)', text) is None
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"${datasource}", "collm-deferral"}


def test_provisioning_fits_compose_and_prometheus() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/collm.yml").read_text())["providers"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(mount.split(":")[:2] for mount in services["grafana"]["volumes"])
    assert source["uid"] == "collm-prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    targets = [config["targets"] for job in prometheus["scrape_configs"] for config in job["static_configs"]]
    assert ["server:8000"] in targets

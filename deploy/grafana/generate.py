"""Makes dashboards/deferral.json from the description in panels.py: ``python deploy/grafana/generate.py``.

Plain Python, no dependencies. ``--check`` writes nothing and fails if the file is not what would be written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panels import ROWS
from parts import HERE, Panel, Query, Row

OUTPUT = Path(__file__).parent / "dashboards" / "deferral.json"
UID = "collm-deferral"
SCHEMA_VERSION = 41
"""That of Grafana 12.1, which docker-compose.yml runs; newer versions raise it when they load the file."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24

OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    },
    "bargauge": {
        "displayMode": "gradient",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "maxVizHeight": 300,
        "minVizHeight": 16,
        "minVizWidth": 8,
        "namePlacement": "auto",
        "orientation": "vertical",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": True,
        "sizing": "auto",
        "valueMode": "color",
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "fill": "dark-orange",
            "exponent": 0.5,
            "steps": 64,
            "reverse": False,
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "percentunit"},
    },
    "table": {"showHeader": True, "cellHeight": "sm", "frameIndex": 0},
}

# Of the panel types that have any.
CUSTOM: dict[str, dict[str, Any]] = {
    "timeseries": {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never", "spanNulls": False},
    "heatmap": {"hideFrom": {"legend": False, "tooltip": False, "viz": False}, "scaleDistribution": {"type": "linear"}},
    "table": {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False},
}


def query_json(number: int, query: Query) -> dict[str, Any]:
    """A target."""
    return {
        "refId": chr(ord("A") + number),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": query.shape,
        "instant": query.instant,
        "range": not query.instant,
    }


def panel_json(panel: Panel, x: int, y: int) -> dict[str, Any]:
    """A panel at its place."""
    defaults = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": [{"color": "green", "value": None}]},
        "color": {"mode": "thresholds" if panel.kind in ("stat", "bargauge") else "palette-classic"},
        "mappings": [],
        **panel.custom,
    }
    if panel.kind in CUSTOM:
        defaults["custom"] = {**CUSTOM[panel.kind], **panel.custom.get("custom", {})}
    width, height = panel.size
    return {
        "id": panel.id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": list(panel.overrides)},
        "options": {**OPTIONS[panel.kind], **panel.options},
        "targets": [query_json(number, query) for number, query in enumerate(panel.queries)],
        "transformations": list(panel.transformations),
    }


def layout(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All panels, rows included, at their places."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        grid = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append(
            {"id": row.id, "type": "row", "title": row.title, "collapsed": False, "gridPos": grid, "panels": []}
        )
        y += 1
        x = height = 0
        for panel in row.panels:
            width, panel_height = panel.size
            if x + width > COLUMNS:
                x, y, height = 0, y + height, 0
            placed.append(panel_json(panel, x, y))
            x += width
            height = max(height, panel_height)
        y += height
    return placed


def variable(name: str, label: str, values: str, **more: Any) -> dict[str, Any]:
    """A variable whose values come from Prometheus; by default several may be chosen, and all are."""
    everything = {"selected": True, "text": ["All"], "value": ["$__all"]}
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"qryType": 1, "query": values, "refId": f"variable-{name}"},
        "definition": values,
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": everything,
        "options": [],
        "hide": 0,
        **more,
    }


VARIABLES: list[dict[str, Any]] = [
    {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "regex": "",
        "current": {},
        "options": [],
        "multi": False,
        "includeAll": False,
        "refresh": 1,
        "hide": 0,
    },
    variable("job", "Job", "label_values(collm_lane_up, job)"),
    variable("model", "Model", 'label_values(collm_lane_up{job=~"$job"}, model_name)'),
    variable("instance", "Instance", 'label_values(collm_lane_up{job=~"$job", model_name=~"$model"}, instance)'),
    variable(
        "threshold",
        "Threshold",
        f"label_values(collm_build_info{{{HERE}}}, threshold)",
        regex="/^([0-9].*)$/",
        multi=False,
        includeAll=False,
        current={},
        hide=2,
    ),
]


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana's JSON model."""
    return {
        "uid": UID,
        "title": "Deferral",
        "description": "A base model and its experts write one answer together: who writes how much, at what cost.",
        "tags": ["collm"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "timepicker": {},
        "fiscalYearStartMonth": 0,
        "weekStart": "",
        "links": [],
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": DATASOURCE,
                    "enable": True,
                    "hide": False,
                    "iconColor": "red",
                    "expr": 'ALERTS{alertname=~"Collm.+", alertstate="firing", job=~"$job"}',
                    "titleFormat": "{{alertname}}",
                    "textFormat": "{{severity}} {{model_name}} {{instance}} {{lane}}",
                    "tagKeys": "severity",
                }
            ]
        },
        "templating": {"list": VARIABLES},
        "panels": layout(ROWS),
    }


def render() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the file, or check it; returns the exit status."""
    if list(arguments) not in ([], ["--check"]):
        print("usage: generate.py [--check]", file=sys.stderr)
        return 2
    if arguments:
        if OUTPUT.is_file() and OUTPUT.read_text("utf-8") == render():
            return 0
        print(f"{OUTPUT.name} is not what generate.py makes: run it without --check", file=sys.stderr)
        return 1
    OUTPUT.write_text(render(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

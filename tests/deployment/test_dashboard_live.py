"""Every query of the dashboard and of the rules, run by a real Prometheus that scrapes a live server under load, once
of stand-in lanes and once of the demo pair on vLLM; and counts and rates compared with what clients were told.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.deployment.live import Load, Prometheus, demo_pair, prometheus, served, standin_pair, wait_until
from tests.deployment.promql import selectors
from tests.deployment.sources import ShippedQuery, dashboard, grafana_quote, need, panel_queries, rules
from tests.packaging.sources import ROOT

pytestmark = pytest.mark.slow

ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = sorted({rule["record"] for rule in rules() if "record" in rule})


@dataclass
class Account:
    """What clients were told in their answers' usage, before the load began."""

    base_tokens: int = 0
    expert_tokens: int = 0
    prompt_tokens: int = 0
    answers: int = 0


@dataclass
class Live:
    """The scene: a server of a joint model, its Prometheus, and the load.

    Attributes:
        account: of the requests before the load.
        counted: what the metrics said then, as in ``account``.
        rate: the deferral rate that the dashboard's first panel said then.
    """

    address: str
    model: str
    prometheus: Prometheus
    load: Load
    account: Account
    counted: Account
    rate: float

    def filled(self, expr: str) -> str:
        """A panel's query as Grafana would send it, with one value chosen for each variable."""
        return filled(expr, self.prometheus, self.address, self.model)


def filled(expr: str, found: Prometheus, address: str, model: str, window: str = "10s") -> str:
    """A panel's query as Grafana would send it; rates are over ``window``."""
    values = {
        "job": "collm",
        "model": grafana_quote(model),
        "instance": grafana_quote(address.removeprefix("http://")),
        "low": "0.1",
        "high": "0.9",
        "__rate_interval": window,
        "__range": "60s",
    }
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], expr)


def ask(address: str, model: str) -> Account:
    """Some requests to the joint model, streamed and whole, one and several choices."""
    account = Account()
    for number in range(12):
        stream = number % 2 == 0
        body = {"model": model, "prompt": f"Request number {number}:", "max_tokens": 5 + number, "n": 1 + number % 3}
        body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        response = httpx.post(f"{address}/v1/completions", json=body, timeout=60).raise_for_status()
        last = response.text.split("\n\n")[-3].removeprefix("data: ") if stream else response.text
        usage = json.loads(last)["usage"]
        account.base_tokens += usage["completion_tokens_details"]["base_tokens"]
        account.expert_tokens += usage["completion_tokens_details"]["expert_tokens"]
        account.prompt_tokens += usage["prompt_tokens"]
        account.answers += 1 + number % 3
    return account


def counted(found: Prometheus, model: str) -> Account:
    """What the metrics say of a model."""

    def total(metric: str, more: str = "") -> int:
        return int(sum(value for _, value in found.query(f'{metric}{{model_name="{model}"{more}}}')))

    return Account(
        base_tokens=total("collm_tokens_total", ', source="base"'),
        expert_tokens=total("collm_tokens_total", ', source!="base"'),
        prompt_tokens=total("collm_prompt_tokens_total"),
        answers=total("collm_requests_total", ', outcome=~"stop|length"'),
    )


@pytest.fixture(scope="module", params=["stand-ins", "demo pair"])
def scraped(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Live]:
    need("prometheus")
    folder = tmp_path_factory.mktemp("live")
    arguments = demo_pair() if request.param == "demo pair" else standin_pair(folder)
    with (
        served(folder, arguments) as address,
        prometheus(folder, address.removeprefix("http://")) as found,
    ):
        model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        wait_until("all targets are scraped", lambda: [t["health"] for t in found.targets()] == ["up", "up"])
        # A rate is the growth from the first scrape on.
        wait_until("nothing is counted yet", lambda: found.query("collm_requests_total") != [])
        account = ask(address, model)
        # A scrape that came in between sees a part: the right one is among the next.
        with contextlib.suppress(TimeoutError):
            wait_until("all is counted", lambda: counted(found, model) == account, 10)
        counts = counted(found, model)
        [panel] = [query for query in panel_queries() if query.where == "panel 'Deferral rate now' A"]
        [(_, rate)] = found.query(filled(panel.expr, found, address, model, window="2m"))
        with Load(address, model) as load:
            scene = Live(address, model, found, load, account, counts, rate)
            wait_for_every_kind(found)
            yield scene


def wait_for_every_kind(found: Prometheus) -> None:
    """Until the load has shown all that panels and rules look at."""
    # Two scrapes give a rate; the load needs some seconds to have shown each of its kinds.
    wait_until("requests are given up", lambda: bool(found.query('collm_requests_total{outcome="aborted"} > 3')))
    wait_until("requests are rejected", lambda: bool(found.query('collm_requests_total{outcome="rejected"} > 0')))
    wait_until("an objective is recorded", lambda: bool(found.query("job_model:collm_too_slow:ratio_rate6h")))
    wait_until("a drift base is recorded", lambda: bool(found.query("job_model:collm_deferral:ratio_rate1h")))


def finite(found: list[tuple[dict[str, str], float]]) -> list[float]:
    return [value for _, value in found if math.isfinite(value)]


def shown(found: Prometheus, expr: str) -> list[float]:
    """What a query gives, as soon as it gives anything: a scrape that comes late, or a window without the rare event
    that a query counts, leave it empty for a moment.
    """
    values: list[float] = []

    def look() -> bool:
        values[:] = finite(found.query(expr))
        return bool(values)

    wait_until(f"{expr} has data", look, 30)
    return values


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.where)
def test_panel_has_data(scraped: Live, query: ShippedQuery) -> None:
    expr = scraped.filled(query.expr)
    assert "$" not in expr.replace('$"', "")
    found = shown(scraped.prometheus, expr)
    unit_interval = re.search(r"/ ?(on \(\w+\) group_left \(\) )?\(", query.expr) or "histogram_quantile" in query.expr
    if unit_interval and not re.search(r"_seconds|_tokens_bucket", query.expr):
        assert all(0 <= value <= 1 for value in found)


@pytest.mark.parametrize("variable", ["job", "model", "instance"])
def test_variable_has_values(scraped: Live, variable: str) -> None:
    [definition] = [item["definition"] for item in dashboard()["templating"]["list"] if item["name"] == variable]
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", definition)
    assert match is not None
    expr, label = scraped.filled(match[1]), match[2]
    assert {labels.get(label) for labels, _ in scraped.prometheus.query(expr)} - {None, ""}


def test_annotations_are_taken(scraped: Live) -> None:
    for annotation in dashboard()["annotations"]["list"]:
        scraped.prometheus.query(scraped.filled(annotation["expr"]))


def test_queries_of_the_page_have_data(scraped: Live) -> None:
    page = (ROOT / "docs/observability.md").read_text("utf-8")
    [block] = re.findall(r"^```promql\n(.*?)^```$", page, re.M | re.S)
    queries = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(queries) >= 3
    for query in queries:
        shown(scraped.prometheus, query)


def test_rules_are_healthy(scraped: Live) -> None:
    loaded = scraped.prometheus.rules()
    assert len(loaded) == len(rules())
    wait_until("all rules have run", lambda: all(rule["health"] != "unknown" for rule in scraped.prometheus.rules()))
    bad = [(rule["name"], rule["lastError"]) for rule in scraped.prometheus.rules() if rule["health"] != "ok"]
    assert bad == []


@pytest.mark.parametrize("name", RECORDED)
def test_recording_rule_has_data(scraped: Live, name: str) -> None:
    shown(scraped.prometheus, name)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_looks_at_what_is_there(scraped: Live, alert: dict[str, str]) -> None:
    """A healthy server fires nothing, so it is what the alert compares that must be there."""
    scraped.prometheus.query(alert["expr"])
    for selector in selectors(alert["expr"]):
        if ("status", "=~", "5..") in selector.matchers:
            continue  # of which a healthy server has none
        shown(scraped.prometheus, selector.text)


def test_counts_are_those_that_clients_were_told(scraped: Live) -> None:
    assert scraped.account.expert_tokens > 0
    assert scraped.counted == scraped.account
    told = scraped.account.expert_tokens / (scraped.account.base_tokens + scraped.account.expert_tokens)
    assert scraped.rate == pytest.approx(told, abs=1e-6)


def test_members_alone_are_not_deferral(scraped: Live) -> None:
    """The expert served alone writes everything, and is in no deferral rate."""
    assert scraped.prometheus.query(f'collm_tokens_total{{model_name="{scraped.model}/codes", source="codes"}} > 0')
    found = scraped.prometheus.query("instance_model:collm_deferral:ratio_rate15m")
    assert [labels["model_name"] for labels, _ in found] == [scraped.model]
    assert 0.1 < found[0][1] < 0.9


def test_load_was_of_every_kind(scraped: Live) -> None:
    assert {0, 200, 400, 429} <= set(scraped.load.statuses)
    assert set(scraped.load.statuses) <= {0, 200, 400, 429}


def test_metrics_are_well_formed(scraped: Live) -> None:
    text = httpx.get(f"{scraped.address}/metrics", timeout=20).text
    command = [need("promtool"), "check", "metrics"]
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")

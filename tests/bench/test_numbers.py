"""Percentiles, spreads, tables, bars, JSON."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from bench import compare
from bench.account import Account
from bench.compare import Found
from bench.load import Outcome
from bench.report import Bar, Report, bar_table, environment, environment_line, json_line, percentile, spread, table
from bench.workload import Cell


def test_percentile_agrees_with_the_standard_library() -> None:
    values = [5.0, 1.0, 9.0, 2.0, 7.0]
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    assert [percentile(values, share) for share in (0.25, 0.5, 0.75)] == quarters
    assert percentile(values, 0) == 1.0
    assert percentile(values, 1) == 9.0
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_spread_shows_median_and_range() -> None:
    assert spread([0.011, 0.013, 0.019], 1, 1000, " ms") == "13.0 ms (11.0-19.0)"
    assert spread([1234.4]) == "1,234"
    assert spread([]) == "-"
    assert spread([math.nan]) == "-"


def test_table_is_markdown() -> None:
    assert table(["name", "n"], [["a", "1"], ["bcdef", "1000"]]).splitlines() == [
        "| name  |    n |",
        "| ----- | ---: |",
        "| a     |    1 |",
        "| bcdef | 1000 |",
    ]


def test_the_median_decides_about_a_bar() -> None:
    assert Bar("x", 1.0, (0.5, 1.1, 1.2)).met
    assert not Bar("x", 1.0, (0.5, 0.9, 1.2)).met
    assert Bar("x", 0.1, (0.05,), at_most=True).met
    assert not Bar("x", 0.1, (0.2,), at_most=True).met
    last = bar_table([Bar("x", 1.0, (0.5,))]).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == ["x", ">= 1", "0.500", "no"]


def test_json_line_is_one_line_without_nan() -> None:
    report = Report("", {"a": math.nan, "b": [1.23456789]}, [Bar("x", 1.0, (2.0,))])
    line = json_line(report.record())
    assert "\n" not in line
    decoded = json.loads(line)
    assert (decoded["a"], decoded["b"]) == (None, [1.23457])
    assert decoded["bars"] == [
        {"name": "x", "limit": 1.0, "values": [2.0], "at_most": False, "median": 2.0, "met": True}
    ]


def test_the_environment_says_how_busy_the_machine_was() -> None:
    facts = environment()
    assert facts["cores"] >= 1
    assert len(facts["load_average"]) == 3
    assert "load average" in environment_line(facts)


def test_account() -> None:
    before = Account(1.0, 0.5, [10, 2], [100, 10], [200, 30], 100, 10, [0.4, 0.1], device_seconds=[0.3, 0.1])
    after = Account(3.0, 2.3, [20, 2], [400, 10], [600, 30], 400, 10, [2.2, 0.1], device_seconds=[1.5, 0.2])
    account = after.since(before)
    assert account.share == pytest.approx(0.1)
    assert account.device_share == pytest.approx(1.3 / 2)
    assert account.own_microseconds_per_token == pytest.approx(1e6 * 0.2 / 300)
    assert account.limit_tokens_per_second == pytest.approx(300 / 1.8)
    assert account.rows_per_step(0) == 30
    assert math.isnan(account.rows_per_step(1))
    assert account.lane_step_seconds[0] == pytest.approx(0.18)
    assert math.isnan(account.lane_step_seconds[1])


def found(**speeds: list[float]) -> Found:
    result = Found()
    for key, values in speeds.items():
        name, _, deferral = key.rpartition("_")
        cell = Cell(32, float(deferral) / 10)
        rounds = [(Outcome(1.0, round(value), [0.1], [0.1], 1), None) for value in values]
        result.outcomes[name.replace("_", " "), cell] = list(rounds)
    return result


def test_bars_are_ratios_within_a_round() -> None:
    measured = found(
        server_0=[100, 300],
        stock_base_0=[100, 200],
        server_10=[50, 60],
        stock_expert_10=[100, 200],
        server_3=[120, 240],
    )
    measured.outcomes[compare.PER_TOKEN_HTTP, Cell(32, 0.3)] = found(x_3=[10, 10]).outcomes["x", Cell(32, 0.3)]
    cells = [Cell(32, rate) for rate in (0.0, 0.3, 1.0)]
    bars = {bar.name: bar for bar in compare.bars("tiny", cells, measured)}
    assert [bar.values for bar in bars.values()] == [(1.0, 1.5), (12.0, 24.0), (1.0, 0.6)]
    assert all("tiny" in name for name in bars)


def test_no_bar_without_its_contenders() -> None:
    assert compare.bars("tiny", [Cell(32, 0.0), Cell(32, 0.3), Cell(32, 1.0)], found(server_0=[1.0])) == []

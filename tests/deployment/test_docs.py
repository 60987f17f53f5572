"""The pages on running the server, against what they speak of: metrics, alerts, queries, arithmetic, links."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench.standin import StandinLane
from engine.loop import StepLoop
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from server.metrics import Metrics
from tests.deployment.promql import selectors, unguarded_divisions
from tests.deployment.sources import dashboard, panels, rules, server_series
from tests.deployment.test_prometheus import anchors
from tests.packaging.sources import ROOT

PAGES = ["observability.md", "runbooks.md", "scaling.md"]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def table(text: str, header: str) -> list[list[str]]:
    """The cells of the table under this header row."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_reference_lists_the_servers_metrics() -> None:
    rows = table(page("observability.md"), "| metric | type | labels |")
    documented = {row[0].strip("`"): (row[1], tuple(row[2].split(", "))) for row in rows}
    assert len(documented) == len(rows)
    exported = {}
    for family in Metrics(["m"], ["base", "law"]).registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        if re.match(r"(collm_engine_)?process_", name):
            continue  # described as a whole
        series = server_series().get(name) or server_series()[f"{name}_count"]
        exported[name] = (family.type, set(series))
    assert {name: (kind, set(labels)) for name, (kind, labels) in documented.items()} == exported
    assert all(row[3] for row in rows)


def test_page_lists_the_alerts() -> None:
    documented = {
        row[0].strip("`"): (row[1], re.findall(r"\((.+)\)", row[3])[0])
        for row in table(page("observability.md"), "| alert | severity |")
    }
    assert documented == {
        rule["alert"]: (rule["labels"]["severity"], rule["annotations"]["runbook_url"].rpartition("docs/")[2])
        for rule in rules()
        if "alert" in rule
    }


def test_queries_fit_the_servers_metrics() -> None:
    [block] = blocks(page("observability.md"), "promql")
    queries = [query for query in re.sub(r"^#.*\n", "", block, flags=re.M).split("\n\n") if query.strip()]
    assert len(queries) == 3
    for query in queries:
        assert unguarded_divisions(query) == []
        for selector in selectors(query):
            labels = server_series()[selector.metric]
            assert all(value in labels[label] for label, _, value in selector.matchers)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page(name)):
        file, _, anchor = target.partition("#")
        text = page(file or name)
        assert not anchor or anchor in anchors(text), target


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name: str) -> None:
    named = set(re.findall(r"`((?:deploy|tests|docs)/[\w./-]+)", page(name)))
    assert [path for path in named if not (ROOT / path).exists() and not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", PAGES)
def test_named_panels_are_on_the_dashboard(name: str) -> None:
    named = set(re.findall(r'"([A-Z][a-z][^"\n]+)"', page(name)))
    board = dashboard()
    variables = {variable.get("label") for variable in board["templating"]["list"]}
    assert named
    assert named - {panel["title"] for panel in panels()} - variables - {board["title"]} == set()


def formulas() -> dict[str, Any]:
    """The functions that the page on scaling defines."""
    [block] = blocks(page("scaling.md"), "python")
    space: dict[str, Any] = {}
    exec(block, space)
    return space


def test_scaling_table_is_what_its_formulas_give() -> None:
    space = formulas()
    for cells in table(page("scaling.md"), "| d | one row |"):
        rate, *given = (float(cell.replace(",", "")) for cell in cells)
        reckoned = [
            space["one_row"](rate, 0.005, 0.012),
            space["lockstep"](32, rate, 0.005, 0.012),
            space["overlapped_at_best"](32, rate, 0.005, 0.012),
            1 / 0.012,
        ]
        assert [round(value) for value in reckoned] == given


@pytest.mark.parametrize(("rows", "rate"), [(1, 0.3), (4, 0.1), (16, 0.1), (16, 0.5)])
def test_step_loop_makes_the_steps_that_the_formulas_count(rows: int, rate: float) -> None:
    tokens = 200
    lanes = [StandinLane(0, "base", experts=1), StandinLane(1, "law")]
    scheduler = Scheduler(
        lanes=2, max_num_seqs=rows, max_model_len=1024, eos_token_ids=[0], strategy=Strategies(2, has_gate=True)
    )
    for number in range(rows):
        sampling = SamplingSpec(max_tokens=tokens, ignore_eos=True, seed=number)
        policy = Collaboration(policy="random", rate=rate)
        scheduler.add(GenerationRequest(str(number), [number, 1, 2], sampling, policy))
    loop = StepLoop(scheduler, list(lanes), "lockstep")
    sources: list[int] = []
    while loop.step():
        for delta in scheduler.take_deltas():
            sources += delta.sources
    base, expert = (lane.stats().steps for lane in lanes)
    deferred = sum(sources)
    assert len(sources) == rows * tokens
    assert base == tokens
    if rows == 1:
        assert expert == deferred
    with_expert_step = 1 - (1 - deferred / len(sources)) ** rows
    assert expert / tokens == pytest.approx(with_expert_step, abs=0.08)


def test_memory_table() -> None:
    """KV bytes per token and of the requests named, from the sizes in the table."""
    rows = {row[0]: row[1:] for row in table(page("scaling.md"), "| | 1B base |")}
    for column, (kib, gib) in enumerate([(32, 8), (128, 32)]):
        layers, heads, size = (int(part) for part in rows["layers, KV heads, head size"][column].split(", "))
        per_token = 2 * layers * heads * size * 2
        assert (per_token, rows["KV per token"][column]) == (kib << 10, f"{kib} KiB")
        assert (per_token * 128 * 2048, rows["KV of 128 requests of 2,048 tokens"][column]) == (gib << 30, f"{gib} GiB")

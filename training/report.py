"""The evaluation's report: a table in Markdown and JSON, and a plot of score against deferral rate."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.bootstrap import interval
from training.files import write_json, write_text
from training.plots import plot_scores

BASE, COLLM, WEAK, FINETUNED = "base alone", "Co-LLM", "weakly supervised", "fine-tuned base"
RANDOM, CONFIDENCE = "random, same rate", "confidence, same rate"
CALIBRATED_CONFIDENCE = "confidence, own threshold"
UNTRAINED_CONFIDENCE, ORACLE = "confidence, untrained base, same rate", "oracle (teacher-forced)"

TAKEN_BACK = "taken_back"
"""Key of the experts' tokens that were taken back, per answer, in rows that take back."""

Row = dict[str, Any]
"""One way of answering, with one seed: ``Result.summary``, which answers are "right", and what more is known."""
Rows = dict[str, dict[int, Row]]
"""Rows by name and seed."""
Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Points (deferral rate, score) by name."""

_LEGEND = (
    "Greedy, on the serving engine. Several seeds: mean ± (largest - smallest). 95 %: the interval that the bootstrap "
    "over questions gives for the mean exact match. Expert s: the answers' part of the experts' steps, in seconds on "
    "this machine. AUROC: of the deferral probability for "
    "gold tokens that the base's argmax misses, teacher-forced. Thresholds of confidence deferral were chosen on the "
    "validation questions. The oracle is computed from teacher-forced scores, and defers only where an expert's argmax "
    "is the gold token and the base's is not."
)
_ASKED_FOR = (
    "Vetoes and regrets were chosen on the validation questions too. Samples are drawn at temperature 0.7; all of them "
    "count in the seconds."
)
_ALWAYS = (FINETUNED, COLLM, WEAK, RANDOM, CONFIDENCE, CALIBRATED_CONFIDENCE, UNTRAINED_CONFIDENCE)
"""Rows of every evaluation that has them, in their order, between the members alone and what was asked for beside."""


def alone(member: str) -> str:
    """The row of a member alone."""
    return f"{member} alone"


def sampled(member: str, samples: int) -> str:
    """The row of a member alone with several tries."""
    return f"{alone(member)}, likeliest of {samples} samples"


def write(folder: Path, rows: Rows, curves: Curves, experts: Sequence[str]) -> None:
    """Write ``table.md``, ``table.json`` and ``curves.png``, and print the table.

    The answers' rights and wrongs ("right") are in no file: intervals are made of them.
    """
    order = [BASE, *map(alone, experts), *_ALWAYS]
    others = [name for name in rows if name not in (*order, ORACLE)]
    rows = {name: rows[name] for name in (*order, *others, ORACLE) if name in rows}
    text = table(rows) + (f"\n{_ASKED_FOR}\n" if others else "")
    summary = {
        name: {key: _mean_and_spread(by_seed, key) for key in ("exact_match", "deferral_rate")}
        for name, by_seed in rows.items()
    }
    points = {name: (found["deferral_rate"][0], found["exact_match"][0]) for name, found in summary.items()}
    write_json(
        folder / "table.json",
        {
            "rows": {name: {seed: _without_right(row) for seed, row in found.items()} for name, found in rows.items()},
            "intervals": {name: _interval(found) for name, found in rows.items()},
            "mean_and_spread": summary,
            "curves": {name: [list(point) for point in curve] for name, curve in curves.items()},
        },
    )
    write_text(folder / "table.md", text)
    plot_scores(folder / "curves.png", curves, points)
    print(text)
    print(f"{folder / 'table.md'}, table.json, curves.png")


def _without_right(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "right"}


def _interval(by_seed: Mapping[int, Row]) -> tuple[float, float] | None:
    """None where it is not known which questions were answered right."""
    right = [row["right"] for row in by_seed.values() if "right" in row]
    return interval(right) if right else None


def _mean_and_spread(by_seed: Mapping[int, Row], key: str) -> tuple[float, float]:
    """Mean over the seeds, and largest less smallest."""
    values = [row[key] for row in by_seed.values()]
    return statistics.mean(values), max(values) - min(values)


def table(rows: Rows) -> str:
    """The Markdown table: "mean ± spread" where there are several seeds, the spread being largest less smallest.

    The scores by task stand in a second table, where there are several tasks.
    """
    heads = [
        "method",
        "seeds",
        "exact match",
        "95 %",
        "deferral rate",
        "expert tokens",
        "expert s",
        "tokens/s",
        "AUROC",
    ]
    # A column of few tables.
    takes_back = any(TAKEN_BACK in row for by_seed in rows.values() for row in by_seed.values())
    lines = _head([*heads, "taken back per answer"] if takes_back else heads)
    for name, by_seed in rows.items():
        found = list(by_seed.values())
        cells = [
            name,
            str(len(found)),
            _cell([row["exact_match"] for row in found], 3),
            "-" if (found_interval := _interval(by_seed)) is None else "{:.3f} to {:.3f}".format(*found_interval),
            _cell([row["deferral_rate"] for row in found], 3),
            _cell([row["expert_tokens"] for row in found], 0),
            _cell([row["expert_seconds"] for row in found if row.get("lane_seconds")], 2),
            _cell([row["tokens_per_second"] for row in found if "tokens_per_second" in row], 0),
            _cell([row["auroc_base_wrong"] for row in found if row.get("auroc_base_wrong") is not None], 3),
        ]
        if takes_back:
            cells.append(_cell([row[TAKEN_BACK] for row in found if TAKEN_BACK in row], 2))
        lines.append("| " + " | ".join(cells) + " |")
    tasks = sorted({task for by_seed in rows.values() for row in by_seed.values() for task in row["by_task"]})
    if len(tasks) > 1:
        lines += ["", *_head(["exact match by task", *rows])]
        for task in tasks:
            cells = [
                _cell([row["by_task"][task] for row in by_seed.values() if task in row["by_task"]], 3)
                for by_seed in rows.values()
            ]
            lines.append("| " + " | ".join([task, *cells]) + " |")
    return "\n".join(lines) + "\n\n" + _LEGEND + "\n"


def _head(heads: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {max(values) - min(values):.{digits}f}"

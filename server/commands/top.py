"""``collm top``: what a server is doing now, from its metrics."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.commands.api import Api, CommandError
from server.commands.options import server_options

Labels = frozenset[tuple[str, str]]

WIDE = 88
"""Columns of a terminal that shows everything."""


@dataclass(frozen=True)
class Scrape:
    """The metrics at one moment.

    Attributes:
        at: ``time.monotonic()``.
        samples: value by name and labels.
    """

    at: float
    samples: dict[tuple[str, Labels], float]

    @classmethod
    def take(cls, api: Api) -> Scrape:
        """Ask a server.

        Raises:
            CommandError: it does not answer as it should.
        """
        text = api.metrics()
        try:
            samples = {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        except ValueError:
            raise CommandError(f"{api.url}/metrics is not in Prometheus' format") from None
        return cls(time.monotonic(), samples)

    def sum(self, name: str, **labels: str) -> float:
        """Over all samples of a name that have these labels."""
        wanted = set(labels.items())
        return math.fsum(value for (each, has), value in self.samples.items() if each == name and wanted <= has)

    def values(self, name: str, label: str) -> list[str]:
        """Values of a label, in the order of the exposition."""
        found = (dict(labels).get(label) for each, labels in self.samples if each == name)
        return list(dict.fromkeys(value for value in found if value is not None))


@dataclass(frozen=True)
class Lane:
    """A lane in the table; a step's duration is None where there was none."""

    name: str
    up: bool
    tokens_per_s: float
    steps_per_s: float
    step_ms: float | None
    rows: int
    kv_usage: float
    catchup_per_s: float
    preemptions: int


@dataclass(frozen=True)
class View:
    """What is shown. Rates are over the time between two scrapes.

    Attributes:
        deferral_rate: of what the joint model wrote in that time; None if nothing.
        deferral_rate_ever: of all that it wrote since the server started.
        first_token_ms, first_token_p95_ms: mean, and the bound that 95 % of the requests kept.
        request_p95_ms: of whole requests.
        errors: requests that ended in an error since the server started.
        errors_per_s: the same in that time.
    """

    version: str
    gate: str
    threshold: str
    tokens_per_s: float
    deferral_rate: float | None
    deferral_rate_ever: float | None
    running: int
    waiting: int
    first_token_ms: float | None
    first_token_p95_ms: float | None
    request_p95_ms: float | None
    errors: int
    errors_per_s: float
    lanes: list[Lane]

    @classmethod
    def between(cls, old: Scrape, new: Scrape) -> View:
        """From two scrapes; a server that restarted between them counts from its start."""
        seconds = max(new.at - old.at, 1e-6)

        def gained(name: str, **labels: str) -> float:
            difference = new.sum(name, **labels) - old.sum(name, **labels)
            return difference if difference >= 0 else new.sum(name, **labels)

        def mean(name: str, **labels: str) -> float | None:
            count = gained(f"{name}_count", **labels)
            return gained(f"{name}_sum", **labels) / count if count > 0 else None

        def p95(name: str) -> float | None:
            bounds = sorted(new.values(f"{name}_bucket", "le"), key=float)
            return _quantile(0.95, [(float(bound), gained(f"{name}_bucket", le=bound)) for bound in bounds])

        joint = new.values("collm_requests_running", "model_name")[:1]
        model = {"model_name": joint[0]} if joint else {}
        ever = new.sum("collm_tokens_total", **model)
        lanes = [
            Lane(
                name=name,
                up=new.sum("collm_lane_up", lane=name) > 0,
                tokens_per_s=gained("collm_tokens_total", source=name) / seconds,
                steps_per_s=gained("collm_lane_step_seconds_count", lane=name) / seconds,
                step_ms=_ms(mean("collm_lane_step_seconds", lane=name)),
                rows=round(new.sum("collm_lane_batch_rows", lane=name)),
                kv_usage=new.sum("collm_lane_kv_cache_usage_ratio", lane=name),
                catchup_per_s=gained("collm_lane_catchup_tokens_total", lane=name) / seconds,
                preemptions=round(new.sum("collm_lane_preemptions_total", lane=name)),
            )
            for name in new.values("collm_lane_up", "lane")
        ]
        written = gained("collm_tokens_total", **model)
        return cls(
            version=next(iter(new.values("collm_build_info", "version")), "not ready"),
            gate=next(iter(new.values("collm_build_info", "gate")), ""),
            threshold=next(iter(new.values("collm_build_info", "threshold")), ""),
            tokens_per_s=gained("collm_tokens_total") / seconds,
            deferral_rate=1 - gained("collm_tokens_total", source="base", **model) / written if written else None,
            deferral_rate_ever=1 - new.sum("collm_tokens_total", source="base", **model) / ever if ever else None,
            running=round(new.sum("collm_requests_running")),
            waiting=round(new.sum("collm_requests_waiting")),
            first_token_ms=_ms(mean("collm_time_to_first_token_seconds")),
            first_token_p95_ms=_ms(p95("collm_time_to_first_token_seconds")),
            request_p95_ms=_ms(p95("collm_request_seconds")),
            errors=round(new.sum("collm_requests_total", outcome="error")),
            errors_per_s=gained("collm_requests_total", outcome="error") / seconds,
            lanes=lanes,
        )

    def head(self) -> list[tuple[str, str]]:
        """Figures of the whole server."""
        return [
            ("tokens/s", f"{self.tokens_per_s:.0f}"),
            ("deferral rate", f"{_share(self.deferral_rate)} now, {_share(self.deferral_rate_ever)} since start"),
            ("running", str(self.running)),
            ("waiting", str(self.waiting)),
            ("first token", f"{_time(self.first_token_ms)}, p95 {_time(self.first_token_p95_ms)}"),
            ("request p95", _time(self.request_p95_ms)),
            ("errors", f"{self.errors_per_s:.1f}/s, {self.errors} since start"),
        ]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The table of lanes, headings first."""
        yield ("lane", "up", "tokens/s", "steps/s", "step", "rows", "KV", "catch-up/s", "preempted")
        for lane in self.lanes:
            yield (
                lane.name,
                "yes" if lane.up else "NO",
                f"{lane.tokens_per_s:.0f}",
                f"{lane.steps_per_s:.0f}",
                _time(lane.step_ms),
                str(lane.rows),
                f"{lane.kv_usage:.0%}",
                f"{lane.catchup_per_s:.0f}",
                str(lane.preemptions),
            )


def plain(view: View) -> str:
    """For a pipe, or for once: ``name value`` lines, then the lanes in columns."""
    lines = [f"{name:<14}{value}" for name, value in view.head()]
    rows = list(view.rows())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *table])


NARROW = ("lane", "up", "tokens/s", "step", "rows", "KV")
"""Columns of lanes that fit a terminal of 60 columns."""


def drawn(view: View, url: str, trouble: str | None, width: int) -> RenderableType:
    """For a terminal of so many columns."""
    gate = f" · gate {view.gate}, threshold {view.threshold}" if view.gate else ""
    title = Text(f"{url} · version {view.version}{gate}", style="dim", overflow="ellipsis", no_wrap=True)
    head = Table.grid(padding=(0, 2, 0, 0))
    for name, value in view.head():
        head.add_row(Text(name, "dim"), Text(value, "bold"))
    rows = view.rows()
    headings = next(rows)
    shown = [number for number, heading in enumerate(headings) if width >= WIDE or heading in NARROW]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number in shown:
        table.add_column(headings[number], justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        cells: list[str | Text] = [row[0], Text(row[1], "bold red" if row[1] == "NO" else ""), *row[2:]]
        table.add_row(*(cells[number] for number in shown))
    last = Text(f"{trouble}; waiting for it", "red") if trouble else Text("q ends", "dim")
    return Group(title, "", head, "", table, "", last)


@click.command(short_help="Watch a server: rates, queue, lanes.")
@click.option("--once", is_flag=True, help="Look once, write plain text, end.")
@click.option(
    "-i", "--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between looks."
)
@server_options
def top(once: bool, interval: float, url: str, key: str | None) -> None:
    """Watch a server: tokens per second, deferral rate, queue, errors, and each lane's steps, rows and KV cache.

    Rates and times are over the last interval. In a terminal q ends it, and a server that is not there yet, or that
    restarts, is waited for.
    """
    api = Api(url, key)
    try:
        if once or not sys.stdout.isatty():
            old = Scrape.take(api)
            time.sleep(interval)
            click.echo(plain(View.between(old, Scrape.take(api))))
        else:
            with _keys() as pressed:
                _watch(api, interval, pressed)
    except KeyboardInterrupt:
        return


def _watch(api: Api, interval: float, pressed: Callable[[float], str]) -> None:
    """Until q is pressed."""
    console = Console(highlight=False)
    old: Scrape | None = None
    view: View | None = None
    with Live(Text(f"waiting for {api.url}", "dim"), console=console, auto_refresh=False, screen=True) as live:
        while True:
            trouble = None
            try:
                new = Scrape.take(api)
                view = View.between(old, new) if old is not None else None
                old = new
            except CommandError as error:
                # It may come back; what is on the screen is the last that was known.
                trouble = error.message
            if view is not None:
                live.update(drawn(view, api.url, trouble, console.width), refresh=True)
            elif trouble:
                live.update(Text(f"{trouble}; waiting for it (q ends)", "red"), refresh=True)
            if pressed(interval) == "q":
                return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """While it lasts, the terminal gives keys as they are pressed; yields a function that waits for one, up to so many
    seconds, and returns it, or "".
    """
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def key(seconds: float) -> str:
        ready, _, _ = select.select([fd], [], [], seconds)
        return os.read(fd, 1).decode("ascii", "ignore") if ready else ""

    tty.setcbreak(fd)
    try:
        yield key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _quantile(share: float, buckets: list[tuple[float, float]]) -> float | None:
    """A histogram's quantile as Prometheus reckons it: linear within a bucket; of the last, its lower bound.

    Args:
        buckets: upper bound and cumulative count, in the order of the bounds; the last bound is infinite.
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = share * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return lower


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _time(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.1f} ms" if ms < 100 else f"{ms:.0f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"

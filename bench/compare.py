"""All contenders side by side: same jobs, rounds interleaved.

With ``starts = "once"`` every server is started once and then frozen (SIGSTOP); in each round and for each cell the
contenders alternate, A B C A B C, each thawed for its own measurement only, since idle engines would take CPU time from
the one that is measured. Neighbouring measurements are seconds apart, which matters on shared machines. With
``starts = "each-round"`` each contender is started anew in every round and runs all cells in a block, in an order that
is reversed every other round: for machines whose memory does not hold all servers at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import statistics
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from bench import processes
from bench.account import Account
from bench.contenders.base import Contender, Service
from bench.contenders.engine_alone import EngineAlone, EngineService, engine_config
from bench.contenders.other_vocabulary import Characters, Words, renumbered
from bench.contenders.per_token_http import PerTokenHttp
from bench.contenders.server import Server, server_service
from bench.contenders.stock import Stock, stock_service
from bench.coordination import ACCOUNT_HEADERS, account_cells, account_record
from bench.errors import BenchError
from bench.load import Outcome, drive
from bench.progress import Progress
from bench.report import Bar, Report, percentile, spread, table
from bench.services import running
from bench.settings import Settings
from bench.shapes import Pair
from bench.workload import Cell, make_jobs

SERVER, ENGINE, BASE, EXPERT, PER_TOKEN_HTTP = "server", "engine", "stock base", "stock expert", "per-token HTTP"
SPECULATIVE = "stock expert, base drafts"
WORDS, CHARACTERS = "engine, words", "engine, characters"
NAMES = (SERVER, ENGINE, WORDS, CHARACTERS, BASE, EXPERT, SPECULATIVE, PER_TOKEN_HTTP)
LIMIT = "limit: lanes' steps"

BASE_BARS = {"tiny": 1.0, "S": 0.97}
"""Server at deferral 0 against stock vLLM with the base, tokens/s at concurrency 32."""
BOTH_BAR = 0.9
"""Server at deferral 1 against 1 / (1/base + 1/expert) of the stock servers."""
PER_TOKEN_HTTP_BARS = {"tiny": 12.0, "S": 15.0}
"""Server at deferral 0.3 against the per-token HTTP baseline, concurrency 8 and 32."""
WORDS_BAR = 0.85
"""Deferral over two vocabularies against deferral over one, tokens/s of the engine alone."""
CHARACTERS_BAR = 1.10
"""Greatest ratio of the engine's time with CharED to the sum of its lanes' steps, concurrency 32."""

_WARM_UP_TOKENS = 4
QUESTIONS = 200
"""Of a real pair's, asked for the quality of what is written; greedy, so once is enough."""


@dataclass
class Found:
    """All that was measured.

    Attributes:
        outcomes: for each contender and cell, one entry per round.
        peak_rss: of each contender's process trees, in bytes.
        cpu_per_token: of those process trees, in seconds, for each contender and cell; one entry per round.
        right: share of a real pair's questions that each contender that writes text answers exactly.
        missing: why contenders take no part, or no part any more: a process that they need did not start.
    """

    outcomes: dict[tuple[str, Cell], list[tuple[Outcome, Account | None]]] = field(default_factory=dict)
    peak_rss: dict[str, int] = field(default_factory=dict)
    cpu_per_token: dict[tuple[str, Cell], list[float]] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def speeds(self, name: str, cell: Cell) -> list[float]:
        """Tokens per second, one entry per round; empty if the contender was not measured there."""
        return [outcome.tokens_per_second for outcome, _ in self.outcomes.get((name, cell), [])]


def contenders(settings: Settings, names: list[str] | None, workdir: Path) -> list[Contender]:
    """Those that were asked for; they share the stock servers, and the engine with an expert of another vocabulary."""
    pair = settings.pair

    @cache
    def other_vocabulary() -> EngineService:
        other = dataclasses.replace(settings, pair=renumbered(pair, workdir))
        return EngineService(engine_config(other), "engine, another vocabulary")

    # As many cores as vLLM would take, all but one, but not the same ones: per-token HTTP uses both servers at once.
    *cores, last = sorted(os.sched_getaffinity(0))
    base = stock_service(BASE, pair.base, settings, cores)
    expert = stock_service(EXPERT, pair.expert, settings, [*cores[1:], last])
    make: dict[str, Callable[[], Contender]] = {
        SERVER: lambda: Server(server_service(settings)),
        ENGINE: lambda: EngineAlone(EngineService(engine_config(settings))),
        CHARACTERS: lambda: Characters(other_vocabulary(), CHARACTERS, settings),
        BASE: lambda: Stock(BASE, base, 0.0),
        EXPERT: lambda: Stock(EXPERT, expert, 1.0),
        SPECULATIVE: lambda: Stock(
            SPECULATIVE, stock_service(SPECULATIVE, pair.expert, settings, cores, draft=pair.base), 1.0
        ),
        PER_TOKEN_HTTP: lambda: PerTokenHttp(base, expert),
    }
    if pair.prompts:
        make[WORDS] = lambda: Words(other_vocabulary(), WORDS, settings)
    return [make[name]() for name in NAMES if name in make and (names is None or name in names)]


async def measure(
    settings: Settings,
    cells: list[Cell],
    *,
    rounds: int,
    requests: int,
    max_tokens: int,
    seed: int,
    starts: Literal["once", "each-round"],
    workdir: Path,
    names: list[str] | None = None,
) -> Report:
    """Run every cell in every round with every contender that takes it.

    Args:
        requests: jobs for each place; slow contenders get one, the first of the same list.
        workdir: what is made for contenders goes there.
        names: of contenders; None is all of them.
    """
    taking_part = contenders(settings, names, workdir)
    services = list({id(service): service for contender in taking_part for service in contender.services}.values())
    found = Found()
    measurements = sum(contender.takes(cell) for contender in taking_part for cell in cells)
    with Progress(rounds * measurements, f"compare {settings.pair.name}") as progress:

        async def measure_once(contender: Contender, cell: Cell, number: int) -> None:
            progress.say(f"round {number + 1}: {contender.name}, {cell}")
            count = cell.concurrency * (1 if contender.slow else requests)
            jobs = make_jobs(settings.pair, cell, count, max_tokens, seed, number, settings.sampling)
            warm_up = make_jobs(
                settings.pair, cell, cell.concurrency, _WARM_UP_TOKENS, seed + 1, number, settings.sampling
            )
            await contender.open()
            await drive(contender, warm_up, cell.concurrency)
            before, cpu = contender.account(), _cpu_seconds(contender)
            outcome = await drive(contender, jobs, cell.concurrency)
            after, cpu = contender.account(), _cpu_seconds(contender) - cpu
            if settings.pair.answers and contender.name not in found.right and isinstance(contender, Stock | Server):
                progress.say(f"{contender.name}, questions")
                found.right[contender.name] = await _right_answers(contender, settings.pair, cell.concurrency)
            await contender.close()
            found.cpu_per_token.setdefault((contender.name, cell), []).append(cpu / outcome.tokens)
            account = after.since(before) if after is not None and before is not None else None
            found.outcomes.setdefault((contender.name, cell), []).append((outcome, account))
            peak = sum(processes.peak_rss_bytes(service.pid) for service in contender.services)
            found.peak_rss[contender.name] = max(peak, found.peak_rss.get(contender.name, 0))
            progress.step()

        def miss(service: Service, error: BenchError) -> None:
            progress.say(f"{service.name} did not start")
            for contender in taking_part:
                if service in contender.services:
                    found.missing[contender.name] = f"{contender.name}: {error}"

        run = _frozen if starts == "once" else _started_anew
        await run(taking_part, services, cells, rounds, measure_once, progress, miss, found.missing)
    return _report(settings, cells, found, requests=requests, max_tokens=max_tokens, starts=starts)


async def _right_answers(contender: Stock | Server, pair: Pair, concurrency: int) -> float:
    """Share of the first questions that are answered exactly, up to space at the ends."""
    places = asyncio.Semaphore(concurrency)

    async def is_right(prompt: Sequence[int], answer: str) -> bool:
        async with places:
            return (await contender.text(prompt, pair.max_tokens)).strip() == answer.strip()

    questions = list(zip(pair.prompts, pair.answers, strict=True))
    asked = questions[:: -(-len(questions) // QUESTIONS)]
    return statistics.fmean(await asyncio.gather(*(is_right(*question) for question in asked)))


def _cpu_seconds(contender: Contender) -> float:
    return sum(processes.cpu_seconds(service.pid) for service in contender.services)


Measure = Callable[[Contender, Cell, int], Awaitable[None]]


async def _frozen(
    taking_part: list[Contender],
    services: list[Service],
    cells: list[Cell],
    rounds: int,
    measure_once: Measure,
    progress: Progress,
    miss: Callable[[Service, BenchError], None],
    missing: Collection[str],
) -> None:
    async with running(services, lambda name: progress.say(f"starting {name}"), miss):
        for number in range(rounds):
            for cell in cells:
                for contender in taking_part:
                    if not contender.takes(cell) or contender.name in missing:
                        continue
                    for service in contender.services:
                        processes.thaw(service.pid)
                    await measure_once(contender, cell, number)
                    for service in contender.services:
                        processes.freeze(service.pid)


async def _started_anew(
    taking_part: list[Contender],
    services: list[Service],
    cells: list[Cell],
    rounds: int,
    measure_once: Measure,
    progress: Progress,
    miss: Callable[[Service, BenchError], None],
    missing: Collection[str],
) -> None:
    for number in range(rounds):
        for contender in taking_part if number % 2 == 0 else reversed(taking_part):
            taken = [cell for cell in cells if contender.takes(cell)]
            if not taken or contender.name in missing:
                continue
            async with running(list(contender.services), lambda name: progress.say(f"starting {name}"), miss):
                if contender.name in missing:
                    continue
                for service in contender.services:
                    processes.thaw(service.pid)
                for cell in taken:
                    await measure_once(contender, cell, number)


# -- report ---------------------------------------------------------------------------------------------------

_HEADERS = [
    "contender",
    "concurrency",
    "deferral",
    "prompts",
    "tokens/s",
    "first token ms",
    "gap p50 ms",
    "gap p99 ms",
    "tokens/arrival",
    "CPU us/token",
]


def _report(
    settings: Settings, cells: list[Cell], found: Found, *, requests: int, max_tokens: int, starts: str
) -> Report:
    rows, engine_rows = [], []
    records: list[dict[str, Any]] = []
    for cell in cells:
        place = [str(cell.concurrency), str(cell.deferral), cell.prompt]
        for name in NAMES:
            measured = found.outcomes.get((name, cell))
            if not measured:
                continue
            outcomes = [outcome for outcome, _ in measured]
            cpu = found.cpu_per_token[name, cell]
            rows.append([name, *place, *_outcome_cells(outcomes), spread([1e6 * one for one in cpu])])
            accounts = [account for _, account in measured if account is not None]
            if accounts:
                limits = [account.limit_tokens_per_second for account in accounts]
                rows.append([LIMIT, *place, spread(limits), "-", "-", "-", "-", "-"])
                shares = [account.share for account in accounts]
                engine_rows.append([str(cell), spread(shares, 1, 100, " %"), *account_cells(accounts)])
            records.append(_record(name, cell, outcomes, accounts) | {"cpu_per_token": cpu})
    text = f"### Comparison, {settings.pair.title}\n\n"
    text += (
        f"{max_tokens} tokens per request, {settings.sampling}; {requests} requests for each one in flight "
        "(per-token HTTP: 1). "
        + (
            "Servers started once; all but the measured one frozen; contenders alternate within every cell of a round."
            if starts == "once"
            else "Each contender started anew in every round; blocks in alternating order."
        )
        + f"\n\n{table(_HEADERS, rows)}\n\n"
    )
    if engine_rows:
        text += f"{table(['engine', 'coordination share', *ACCOUNT_HEADERS], engine_rows)}\n\n"
    headers = ["contender", "peak resident memory, MiB"]
    peaks = [[name, f"{peak / 2**20:,.0f}"] for name, peak in found.peak_rss.items()]
    if found.right:
        headers.append("questions answered exactly")
        for row in peaks:
            row.append(f"{found.right[row[0]]:.1%}" if row[0] in found.right else "-")
    text += table(headers, peaks)
    if found.missing:
        text += "\n\nDid not start: " + "; ".join(found.missing.values())
    data = {
        "measurement": "compare",
        "shape": settings.pair.name,
        "starts": starts,
        "requests_per_place": requests,
        "max_tokens": max_tokens,
        "peak_rss_bytes": found.peak_rss,
        "answered_exactly": found.right,
        "cells": records,
    }
    return Report(text, data, bars(settings.pair.name, cells, found), tuple(found.missing.values()))


def _outcome_cells(outcomes: list[Outcome]) -> list[str]:
    return [
        spread([outcome.tokens_per_second for outcome in outcomes]),
        spread([percentile(outcome.first, 0.5) for outcome in outcomes], 1, 1000),
        spread([percentile(outcome.gaps, 0.5) for outcome in outcomes], 2, 1000),
        spread([percentile(outcome.gaps, 0.99) for outcome in outcomes], 2, 1000),
        f"{statistics.median(outcome.tokens / outcome.arrivals for outcome in outcomes):.2f}",
    ]


def _record(name: str, cell: Cell, outcomes: list[Outcome], accounts: list[Account]) -> dict[str, Any]:
    return {
        "contender": name,
        "concurrency": cell.concurrency,
        "deferral": cell.deferral,
        "prompt": cell.prompt,
        "tokens": [outcome.tokens for outcome in outcomes],
        "tokens_per_second": [outcome.tokens_per_second for outcome in outcomes],
        "first_token_p50": [percentile(outcome.first, 0.5) for outcome in outcomes],
        "first_token_p99": [percentile(outcome.first, 0.99) for outcome in outcomes],
        "gap_p50": [percentile(outcome.gaps, 0.5) for outcome in outcomes],
        "gap_p99": [percentile(outcome.gaps, 0.99) for outcome in outcomes],
        "arrivals": [outcome.arrivals for outcome in outcomes],
        "accounts": [account_record(account) for account in accounts],
    }


def bars(shape: str, cells: list[Cell], found: Found) -> list[Bar]:
    """The promises that these cells can tell about. Ratios are taken within a round, then their median."""
    result: list[Bar] = []

    def add(name: str, limit: float, values: list[float]) -> None:
        if values and not any(map(math.isnan, values)):
            result.append(Bar(name, limit, tuple(values)))

    for cell in cells:
        words = zip(found.speeds(WORDS, cell), found.speeds(ENGINE, cell), strict=False)
        add(f"{shape}: {WORDS} / engine, {cell}", WORDS_BAR, [ours / theirs for ours, theirs in words])
        if cell.concurrency == 32:
            drawn = [account for _, account in found.outcomes.get((CHARACTERS, cell), []) if account is not None]
            over = [account.loop_seconds / account.step_seconds for account in drawn]
            if over:
                label = f"{shape}: time with CharED / lanes' steps, {cell}"
                result.append(Bar(label, CHARACTERS_BAR, tuple(over), at_most=True))
        served = found.speeds(SERVER, cell)
        if cell.deferral == 0.0 and cell.concurrency == 32 and shape in BASE_BARS:
            stock = found.speeds(BASE, cell)
            ratios = [ours / theirs for ours, theirs in zip(served, stock, strict=False)]
            add(f"{shape}: server / stock base, {cell}", BASE_BARS[shape], ratios)
        if cell.deferral == 1.0:
            base = found.speeds(BASE, Cell(cell.concurrency, 0.0, cell.prompt))
            expert = found.speeds(EXPERT, cell)
            ratios = [ours * (1 / b + 1 / e) for ours, b, e in zip(served, base, expert, strict=False)]
            add(f"{shape}: server / (stock base, then stock expert), {cell}", BOTH_BAR, ratios)
        if cell.deferral == 0.3 and cell.concurrency in (8, 32) and shape in PER_TOKEN_HTTP_BARS:
            reference = found.speeds(PER_TOKEN_HTTP, cell)
            ratios = [ours / theirs for ours, theirs in zip(served, reference, strict=False)]
            add(f"{shape}: server / per-token HTTP, {cell}", PER_TOKEN_HTTP_BARS[shape], ratios)
    return result

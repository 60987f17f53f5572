"""The coordination share: how much of the engine's time goes to anything but the lanes' own steps.

The engine alone, no HTTP. Its own account says how long it was not idle (``loop_seconds``) and how long the lanes' own
steps took (``step_seconds``); in lockstep the difference is what joining two models costs.
"""

from __future__ import annotations

from dataclasses import asdict

from bench import processes
from bench.account import Account
from bench.contenders.engine_alone import EngineAlone, EngineService, engine_config
from bench.load import Outcome, drive
from bench.progress import Progress
from bench.report import Bar, Report, spread, table
from bench.services import running
from bench.settings import Settings
from bench.shapes import DEMO
from bench.workload import Cell, make_jobs

SHARE_BARS = {"tiny": 0.10, "S": 0.04, DEMO: 0.15}
"""Greatest coordination share at concurrency 32, lockstep."""
BAR_CONCURRENCY = 32


async def measure(
    settings: Settings, cells: list[Cell], *, rounds: int, requests: int, max_tokens: int, seed: int
) -> Report:
    """Run every cell in every round.

    Args:
        requests: jobs for each place, so that a cell has ``requests`` x concurrency of them.
    """
    service = EngineService(engine_config(settings))
    contender = EngineAlone(service)
    found: dict[Cell, list[tuple[Outcome, Account]]] = {cell: [] for cell in cells}
    with Progress(1 + rounds * len(cells), "coordination") as progress:
        async with running([service], lambda name: progress.say(f"starting {name}")):
            processes.thaw(service.pid)
            progress.step()
            warm_up = cells[0]
            for round_number in range(-1, rounds):
                for cell in [warm_up] if round_number < 0 else cells:
                    progress.say(f"{settings.pair.name} {cell}")
                    count = cell.concurrency * (1 if round_number < 0 else requests)
                    jobs = make_jobs(settings.pair, cell, count, max_tokens, seed, round_number, settings.sampling)
                    before = contender.account()
                    outcome = await drive(contender, jobs, cell.concurrency)
                    if round_number >= 0:
                        found[cell].append((outcome, contender.account().since(before)))
                        progress.step()
            peak = processes.peak_rss_bytes(service.pid)
            lockstep = service.client.info.coordination == "lockstep"
    return _report(settings, found, peak, lockstep=lockstep)


def _report(
    settings: Settings, found: dict[Cell, list[tuple[Outcome, Account]]], peak: int, *, lockstep: bool
) -> Report:
    rows, cells, bars = [], [], []
    for cell, measured in found.items():
        accounts = [account for _, account in measured]
        shares = [account.share for account in accounts]
        rows.append(
            [
                str(cell),
                spread([outcome.tokens_per_second for outcome, _ in measured]),
                # Steps that overlap are longer together than the time in which they were done.
                spread(shares, 1, 100, " %") if lockstep else "-",
                spread([account.device_share for account in accounts], 1, 100, " %"),
                spread([account.own_microseconds_per_token for account in accounts]) if lockstep else "-",
                *account_cells(accounts),
            ]
        )
        cells.append(
            {
                "concurrency": cell.concurrency,
                "deferral": cell.deferral,
                "prompt": cell.prompt,
                "tokens_per_second": [outcome.tokens_per_second for outcome, _ in measured],
                "accounts": [account_record(account) for account in accounts],
            }
        )
        name = settings.pair.name
        if lockstep and name in SHARE_BARS and (cell.concurrency, cell.prompt) == (BAR_CONCURRENCY, "short"):
            label = f"{name}: coordination share, engine, {cell}"
            bars.append(Bar(label, SHARE_BARS[name], tuple(shares), at_most=True))
    headers = ["cell", "tokens/s", "coordination share", "device busy", "own us/token", *ACCOUNT_HEADERS]
    drawn = f", {settings.sampling}" if settings.sampling.temperature else ""
    text = f"### Coordination, {settings.pair.title}, engine alone{drawn}\n\n{table(headers, rows)}\n\n"
    text += f"Peak resident memory of the engine's process: {peak / 2**20:,.0f} MiB."
    data = {
        "measurement": "coordination",
        "shape": settings.pair.name,
        "lockstep": lockstep,
        "sampling": asdict(settings.sampling),
        "peak_rss_bytes": peak,
        "cells": cells,
    }
    return Report(text, data, bars)


ACCOUNT_HEADERS = [
    "deferred",
    "base step ms",
    "expert step ms",
    "base rows/step",
    "expert rows/step",
    "expert steps/token",
]


def account_cells(accounts: list[Account]) -> list[str]:
    """What the engine's accounts tell beside the share, in the order of ACCOUNT_HEADERS."""
    if not accounts:
        return ["-"] * len(ACCOUNT_HEADERS)
    return [
        spread([account.expert_tokens / account.tokens for account in accounts], 1, 100, " %"),
        *(spread([account.lane_step_seconds[lane] for account in accounts], 2, 1000) for lane in (0, 1)),
        *(spread([account.rows_per_step(lane) for account in accounts], 1) for lane in (0, 1)),
        spread([account.steps[1] / account.tokens for account in accounts], 3),
    ]


def account_record(account: Account) -> dict[str, object]:
    """An account for JSON."""
    return {
        "loop_seconds": account.loop_seconds,
        "step_seconds": account.step_seconds,
        "share": account.share,
        "own_microseconds_per_token": account.own_microseconds_per_token,
        "limit_tokens_per_second": account.limit_tokens_per_second,
        "tokens": account.tokens,
        "expert_tokens": account.expert_tokens,
        "steps": account.steps,
        "rows": account.rows,
        "computed": account.computed,
        "lane_seconds": account.lane_seconds,
        "device_seconds": account.device_seconds,
        "device_share": account.device_share,
    }

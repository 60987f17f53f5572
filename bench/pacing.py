"""What gather and run-ahead bring: the engine alone, jobs of one kind, with and without each of them.

Two engines, one that never lets an expert's step wait and one that does; whether the base drafts ahead is said with
every request. The engines alternate, each frozen while the other is measured. A first round is not counted: on a CPU
matrix products are compiled for every number of rows when it first comes up, for milliseconds each, and the ways differ
in how many numbers they bring up.
"""

from __future__ import annotations

import dataclasses

from bench.account import Account
from bench.contenders.engine_alone import EngineAlone, EngineService, engine_config
from bench.coordination import account_record
from bench.report import Bar, Report, percentile, spread, table
from bench.rounds import SPEED, Found, in_turn, ratios
from bench.settings import Settings
from bench.shapes import DEMO
from bench.workload import Cell

LOCKSTEP = {"coordination": "lockstep", "gather": "off", "run_ahead": "off"}
"""Engine settings of lockstep as it is: base step, expert step, repeat."""

PLAIN, GATHER, AHEAD, AHEAD_4, BOTH = "lockstep", "gather", "run-ahead", "run-ahead 4", "both"

GATHER_BAR = 1.3
"""Gather against lockstep, tokens/s, shape S, deferral 0.1, concurrency 32."""
VISITS_BAR = 1.5
"""Lockstep's expert steps for each deferred token against those with run-ahead, demo pair, concurrency 8."""


async def measure(
    settings: Settings, cells: list[Cell], *, rounds: int, requests: int, max_tokens: int, seed: int
) -> Report:
    """Run every cell in every round in every way.

    Args:
        requests: jobs for each place, so that a cell has ``requests`` x concurrency of them.
    """
    waiting = {"gather": "auto", **settings.scheduler}
    at_once = EngineService(engine_config(dataclasses.replace(settings, scheduler=settings.scheduler | LOCKSTEP)))
    gathers = EngineService(engine_config(dataclasses.replace(settings, scheduler=LOCKSTEP | waiting)))
    ways = [
        EngineAlone(at_once, PLAIN, "off"),
        EngineAlone(at_once, AHEAD, "auto"),
        EngineAlone(at_once, AHEAD_4, 4),
        EngineAlone(gathers, GATHER, "off"),
        EngineAlone(gathers, BOTH, "auto"),
    ]
    found = await in_turn(
        "pacing", ways, cells, settings, rounds=rounds, requests=requests, max_tokens=max_tokens, seed=seed
    )
    return _report(settings, cells, [way.name for way in ways], found, max_tokens)


def _visits(account: Account) -> float:
    return account.steps[1] / account.expert_tokens if account.expert_tokens else float("nan")


def _report(
    settings: Settings,
    cells: list[Cell],
    names: list[str],
    found: Found,
    max_tokens: int,
) -> Report:
    shape = settings.pair.name
    rows, records, bars = [], [], []
    for cell in cells:
        plain = found[cell, PLAIN]
        for name in names:
            measured = found[cell, name]
            outcomes = [one.outcome for one in measured]
            accounts = [one.account for one in measured]
            faster = ratios(measured, plain, SPEED)
            fewer = ratios(plain, measured, lambda one: _visits(one.account))
            rows.append(
                [
                    f"{cell}: {name}",
                    spread([outcome.tokens_per_second for outcome in outcomes]),
                    spread(faster, 2),
                    spread([_visits(account) for account in accounts], 2),
                    spread([account.rows_per_step(1) for account in accounts], 1),
                    spread([account.rows_per_step(0) for account in accounts], 1),
                    spread([account.accepted / account.tokens for account in accounts], 1, 100, " %"),
                    spread([account.discarded / account.tokens for account in accounts], 1, 100, " %"),
                    spread([percentile(outcome.gaps, 0.5) for outcome in outcomes], 1, 1000),
                    spread([percentile(outcome.gaps, 0.99) for outcome in outcomes], 1, 1000),
                ]
            )
            records.append(
                {
                    "concurrency": cell.concurrency,
                    "deferral": cell.deferral,
                    "way": name,
                    "tokens_per_second": [outcome.tokens_per_second for outcome in outcomes],
                    "gap_p99": [percentile(outcome.gaps, 0.99) for outcome in outcomes],
                    "accounts": [account_record(account) for account in accounts],
                }
            )
            if shape == "S" and (cell.concurrency, cell.deferral, name) == (32, 0.1, GATHER):
                bars.append(Bar(f"S: gather / lockstep, tokens/s, {cell}", GATHER_BAR, tuple(faster)))
            if shape == DEMO and cell.concurrency == 8 and name in (AHEAD, BOTH):
                bars.append(Bar(f"{shape}: lockstep / {name}, expert steps, {cell}", VISITS_BAR, tuple(fewer)))
                bars.append(Bar(f"{shape}: {name} / lockstep, tokens/s, {cell}", 1.0, tuple(faster)))
    headers = [
        "",
        "tokens/s",
        "/ lockstep",
        "expert steps/deferral",
        "expert rows/step",
        "base rows/step",
        "drafts stood",
        "cut",
        "gap p50 ms",
        "gap p99 ms",
    ]
    text = f"### Pacing, {settings.pair.title}, engine alone\n\n"
    text += f"{max_tokens} tokens per request, greedy; drafts are a share of all tokens.\n\n{table(headers, rows)}"
    return Report(text, {"measurement": "pacing", "shape": shape, "max_tokens": max_tokens, "cells": records}, bars)

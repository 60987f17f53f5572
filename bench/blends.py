"""What combining distributions costs beyond the lanes' steps: the engine alone, all members at every position.

One engine, jobs of one kind in several ways: the expert's own tokens, which is what the same steps cost without a
blend, and each kind of blend; step by step, and with drafts. The ways take turns. What is compared is processor time,
which other work on the machine changes least; it wants an engine with one thread (``--threads 1``), since threads that
wait for each other by spinning take time too.
"""

from __future__ import annotations

import dataclasses

from bench.contenders.engine_alone import EngineAlone, EngineService, engine_config
from bench.coordination import account_record
from bench.pacing import LOCKSTEP
from bench.report import Bar, Report, spread, table
from bench.rounds import Found, Measured, in_turn, ratios
from bench.settings import Settings
from bench.workload import Cell
from engine.blends import Blend

HALF = ((0, 0.5), (1, 0.5))
PLAIN, DRAFTS = "expert's own tokens", ", with drafts"
KINDS = {
    "mixture": Blend("mixture", HALF),
    "product, plausible": Blend("product", ((0, -0.5), (1, 1.5)), anchor=1, plausibility=0.1),
    "union of 10": Blend("union", HALF),
}

OWN_TIME_BAR = 1.10
"""Greatest ratio of the engine's processor time per token with a blend to what both lanes' steps take without one; 32
rows."""
VISITS_BAR = 1.3
"""Expert steps per token without drafts to those with them, where base and expert are related."""


def _steps_per_token(measured: Measured) -> float:
    """Processor seconds of the lanes' steps alone: without what the account says is coordination."""
    return measured.cpu_per_token * (1 - measured.account.share)


def _visits(measured: Measured) -> float:
    """Expert steps per token."""
    return measured.account.steps[1] / measured.account.tokens


async def measure(
    settings: Settings, cells: list[Cell], *, rounds: int, requests: int, max_tokens: int, seed: int
) -> Report:
    """Run every cell in every round in every way; the first round is not counted.

    Args:
        cells: at deferral 1: what is not asked is not blended.
        requests: jobs for each place, so that a cell has ``requests`` x concurrency of them.
    """
    plain = dataclasses.replace(settings, scheduler=dict(LOCKSTEP) | settings.scheduler)
    service = EngineService(engine_config(plain))
    ways = [EngineAlone(service, PLAIN, "off")]
    ways += [EngineAlone(service, name, "off", blend=blend) for name, blend in KINDS.items()]
    ways += [EngineAlone(service, PLAIN + DRAFTS, "auto")]
    ways += [EngineAlone(service, name + DRAFTS, "auto", blend=blend) for name, blend in KINDS.items()]
    found = await in_turn(
        "blends", ways, cells, settings, rounds=rounds, requests=requests, max_tokens=max_tokens, seed=seed
    )
    return _report(settings, cells, [way.name for way in ways], found, max_tokens)


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
            measured, stepwise = found[cell, name], found[cell, name.removesuffix(DRAFTS)]
            accounts = [one.account for one in measured]
            over = [one.cpu_per_token / _steps_per_token(other) for one, other in zip(measured, plain, strict=True)]
            fewer = ratios(stepwise, measured, _visits)
            rows.append(
                [
                    f"{cell}: {name}",
                    spread([one.speed for one in measured]),
                    spread(over, 2),
                    spread([account.share for account in accounts], 1, 100, " %"),
                    *(spread([account.lane_step_seconds[lane] for account in accounts], 2, 1000) for lane in (0, 1)),
                    spread([1e6 * one.cpu_per_token for one in measured]),
                    spread([_visits(one) for one in measured], 3),
                    spread(fewer, 2),
                ]
            )
            records.append(
                {
                    "concurrency": cell.concurrency,
                    "way": name,
                    "tokens_per_second": [one.speed for one in measured],
                    "cpu_seconds": [one.cpu_seconds for one in measured],
                    "over_steps": over,
                    "accounts": [account_record(account) for account in accounts],
                }
            )
            if cell.concurrency == 32 and name in KINDS:
                label = f"{shape}: CPU per token with {name} / both lanes' steps without, {cell}"
                bars.append(Bar(label, OWN_TIME_BAR, tuple(over), at_most=True))
            if name.removesuffix(DRAFTS) in KINDS and name.endswith(DRAFTS):
                bars.append(Bar(f"{shape}: expert steps, step by step / {name}, {cell}", VISITS_BAR, tuple(fewer)))
    headers = [
        "",
        "tokens/s",
        "CPU / steps' without",
        "coordination share",
        "base step ms",
        "expert step ms",
        "CPU us/token",
        "expert steps/token",
        "fewer",
    ]
    text = f"### Blends, {settings.pair.title}, engine alone, all members at every position\n\n"
    text += f"{max_tokens} tokens per request, greedy.\n\n{table(headers, rows)}"
    return Report(text, {"measurement": "blends", "shape": shape, "max_tokens": max_tokens, "cells": records}, bars)

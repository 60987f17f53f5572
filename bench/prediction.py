"""Does the cost model say beforehand what is measured? And what does it say of when a pair is worth it?

The model's five kinds of cost are fitted to lockstep at deferral 0 and 1. Then it predicts what it has not seen: other
rates, the pair's own gate, gather and run-ahead. Fitting and checking are done within each round. As in
:mod:`bench.pacing`, a first round is not counted.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from bench import processes
from bench.account import Account
from bench.contenders.engine_alone import EngineAlone, EngineService, engine_config
from bench.cost_model import PairCost, Predicted, predict
from bench.load import Outcome, drive
from bench.pacing import LOCKSTEP
from bench.progress import Progress
from bench.report import Bar, Report, spread, table
from bench.services import running
from bench.settings import Settings
from bench.workload import Cell, Deferral, make_jobs
from engine.config import SchedulerConfig

ERROR_BAR = 0.15
"""Greatest error of predicted tokens/s, as a share."""
FITTED: tuple[Deferral, ...] = (0.0, 1.0)
"""Deferral rates that the model's costs are fitted to."""
ASKED = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Deferral rates for which the model is asked whether the pair is worth it."""

PLAIN, PACED = "lockstep", "automatic"
_WARM_UP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Checked:
    """One cell of one round: what was measured, and what the model made of the same jobs."""

    outcome: Outcome
    account: Account
    predicted: Predicted

    @property
    def ratio(self) -> float:
        """Predicted tokens/s over measured ones."""
        return self.predicted.tokens_per_second / self.outcome.tokens_per_second


async def measure(
    settings: Settings,
    concurrencies: list[int],
    deferrals: list[Deferral],
    *,
    rounds: int,
    requests: int,
    max_tokens: int,
    seed: int,
) -> Report:
    """Fit and check in every round.

    Args:
        concurrencies: of the fitted and the predicted cells; with one alone, fixed costs are not told from others.
        deferrals: rates to predict.
        requests: jobs for each place, so that a cell has ``requests`` x concurrency of them.
    """
    ways: dict[str, dict[str, Any]] = {PLAIN: LOCKSTEP, PACED: {"coordination": "lockstep"} | settings.scheduler}
    services = {
        way: EngineService(engine_config(dataclasses.replace(settings, scheduler=scheduler)))
        for way, scheduler in ways.items()
    }
    found: dict[tuple[Cell, str], list[Checked]] = {}
    costs: list[PairCost] = []
    fitted = [Cell(concurrency, deferral) for concurrency in concurrencies for deferral in FITTED]
    checked = [Cell(concurrency, deferral) for concurrency in concurrencies for deferral in deferrals]
    with Progress((1 + rounds) * (len(fitted) + len(checked) * len(ways)), f"predict {settings.pair.name}") as progress:

        async def run(way: str, cell: Cell, round_number: int) -> tuple[Outcome, Account]:
            progress.say(f"round {round_number + 1}: {way}, {cell}")
            service = services[way]
            contender = EngineAlone(service)
            processes.thaw(service.pid)
            draw = round_number * len(ways) + list(ways).index(way)
            warm_up = make_jobs(settings.pair, cell, cell.concurrency, _WARM_UP_TOKENS, seed + 1, draw)
            await drive(contender, warm_up, cell.concurrency)
            before = contender.account()
            jobs = make_jobs(settings.pair, cell, cell.concurrency * requests, max_tokens, seed, draw)
            outcome = await drive(contender, jobs, cell.concurrency)
            processes.freeze(service.pid)
            progress.step()
            return outcome, contender.account().since(before)

        async with running(list(services.values()), lambda name: progress.say(f"starting {name}")):
            for cell in fitted:
                await run(PLAIN, cell, -1)
            for cell in checked:
                for way in ways:
                    await run(way, cell, -1)
            for round_number in range(rounds):
                cost = PairCost.of([(await run(PLAIN, cell, round_number))[1] for cell in fitted])
                costs.append(cost)
                for cell in checked:
                    for way, scheduler in ways.items():
                        outcome, account = await run(way, cell, round_number)
                        predicted = _same_work(
                            cost, settings, cell, account, scheduler, outcome, max_tokens=max_tokens, seed=seed
                        )
                        found.setdefault((cell, way), []).append(Checked(outcome, account, predicted))
    return _report(settings, concurrencies, costs, found, requests=requests, max_tokens=max_tokens, seed=seed)


def _same_work(
    cost: PairCost,
    settings: Settings,
    cell: Cell,
    account: Account,
    scheduler: dict[str, Any],
    outcome: Outcome,
    *,
    max_tokens: int,
    seed: int,
) -> Predicted:
    """What the model makes of a cell; of a gate it is told only the rate, and how often its expert agreed."""
    rate = account.expert_tokens / account.tokens if cell.deferral == "gate" else cell.deferral
    forced = dataclasses.replace(cell, deferral=rate)
    jobs = make_jobs(settings.pair, forced, outcome.tokens // max_tokens, max_tokens, seed, 0)
    agreement = account.agreements / account.expert_tokens if account.expert_tokens else 0.0
    return predict(cost, jobs, cell.concurrency, SchedulerConfig.model_validate(scheduler), agreement=agreement)


def _worth(
    settings: Settings, cost: PairCost, concurrencies: list[int], *, requests: int, max_tokens: int, seed: int
) -> list[list[str]]:
    """Predicted tokens/s of the pair, with the default settings, over those of the expert alone."""
    scheduler = SchedulerConfig.model_validate({"coordination": "lockstep"} | settings.scheduler)
    rows = []
    for concurrency in concurrencies:
        jobs = make_jobs(settings.pair, Cell(concurrency, 1.0), concurrency * requests, max_tokens, seed, 0)
        alone = predict(cost, jobs, concurrency, scheduler, member=1)
        for name, agreement in (("no draft agrees", 0.0), ("half of the drafts agree", 0.5)):
            cells = []
            for rate in ASKED:
                same = [dataclasses.replace(job, deferral=rate) for job in jobs]
                pair = predict(cost, same, concurrency, scheduler, agreement=agreement)
                cells.append(f"{pair.tokens_per_second / alone.tokens_per_second:.2f}")
            rows.append([f"c{concurrency}, {name}", *cells])
    return rows


def _report(
    settings: Settings,
    concurrencies: list[int],
    costs: list[PairCost],
    found: dict[tuple[Cell, str], list[Checked]],
    *,
    requests: int,
    max_tokens: int,
    seed: int,
) -> Report:
    shape = settings.pair.name
    cost_rows = [
        [
            name,
            *(
                spread([getattr(cost.lanes[lane], part) for cost in costs], 3, 1e3)
                for part in ("fixed", "token", "row")
            ),
        ]
        for lane, name in enumerate(("base step", "expert step"))
    ]
    cost_rows.append(
        [
            "the engine's own",
            spread([cost.pass_seconds for cost in costs], 3, 1e3),
            "-",
            spread([cost.row_seconds for cost in costs], 3, 1e3),
        ]
    )
    rows, bars, records = [], [], []
    for (cell, way), checks in found.items():
        ratios = [check.ratio for check in checks]
        rows.append(
            [
                f"{cell}: {way}",
                spread([check.outcome.tokens_per_second for check in checks]),
                spread([check.predicted.tokens_per_second for check in checks]),
                spread(ratios, 2),
                spread([check.account.steps[1] / check.account.tokens for check in checks], 3),
                spread([check.predicted.steps[1] / check.predicted.tokens for check in checks], 3),
            ]
        )
        error = abs(statistics.median(ratios) - 1.0)
        bars.append(Bar(f"{shape}: error of the cost model, {cell}, {way}", ERROR_BAR, (error,), at_most=True))
        records.append(
            {
                "concurrency": cell.concurrency,
                "deferral": cell.deferral,
                "way": way,
                "tokens_per_second": [check.outcome.tokens_per_second for check in checks],
                "predicted": [check.predicted.tokens_per_second for check in checks],
                "expert_steps": [check.account.steps[1] for check in checks],
                "predicted_expert_steps": [check.predicted.steps[1] for check in checks],
            }
        )
    last = costs[-1]
    worth = _worth(settings, last, concurrencies, requests=requests, max_tokens=max_tokens, seed=seed)
    text = (
        f"### Cost model, {settings.pair.title}, engine alone\n\n"
        "Fitted to lockstep at deferral 0 and 1, milliseconds:\n\n"
        + table(["", "each step", "each token", "each row"], cost_rows)
        + f"\n\nWhat it predicts of cells that it was not fitted to, {max_tokens} tokens per request:\n\n"
        + table(
            ["", "tokens/s", "predicted", "ratio", "expert steps/token", "predicted"],
            rows,
        )
        + "\n\nPredicted tokens/s of the pair over those of its expert alone, by deferral rate:\n\n"
        + table(["", *(f"{rate:g}" for rate in ASKED)], worth)
    )
    data = {
        "measurement": "predict",
        "shape": shape,
        "max_tokens": max_tokens,
        "costs": [dataclasses.asdict(cost) for cost in costs],
        "cells": records,
        "worth": worth,
    }
    return Report(text, data, bars)

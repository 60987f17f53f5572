"""Rows of the evaluation's table for what else the joint model can be asked to do beside plain deferral.

Proxy tuning is none of them: its members have parts (tuned, untuned) that experts of a project do not have;
``python -m training.demo.proxy`` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from engine.blends import Blend
from engine.types import BASE
from training.answers import AnswerCache
from training.project import Project
from training.report import COLLM
from training.serving import Questions, Result
from training.settings import StrategyRow
from training.thresholds import Point, within_noise

VETOES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def row_name(row: StrategyRow) -> str:
    """As the table has it. Characters ask no gate."""
    return row if row == "characters" else f"{COLLM}, {row}"


def strategy_rows(
    project: Project, cache: AnswerCache, questions: Questions, validation: Questions, threshold: float
) -> Iterator[tuple[str, Result, dict[str, Any]]]:
    """Name, answers, and what was chosen, of each row that the settings name.

    Args:
        cache: of a run's base and gate.
        threshold: of the gate.
    """
    for row in dict.fromkeys(project.settings.evaluate.strategies):
        how: dict[str, Any] = {"policy": "threshold", "threshold": threshold}
        chosen: dict[str, Any] = {}
        if row == "veto":
            chosen["veto"] = how["veto"] = _best_veto(cache, validation, how, project.settings.calibrate.noise)
        elif row == "characters":
            how = {"strategy": "characters"}
        else:
            how["blend"] = _blend(row, 1 + len(project.expert_paths))
        yield row_name(row), cache.answers(row, questions, **how), chosen


def _blend(kind: StrategyRow, members: int) -> dict[str, Any]:
    """All members: a mixture by the gate's probabilities, others with equal weights."""
    lanes = range(members)
    even = tuple((lane, 1 / members) for lane in lanes)
    blends: dict[StrategyRow, Blend] = {
        "mixture": Blend("mixture", tuple((lane, 0.0) for lane in lanes), from_gate=True),
        "product": Blend("product", even),
        "union": Blend("union", even),
    }
    found: dict[str, Any] = msgspec.to_builtins(blends[kind])
    return found


def _best_veto(cache: AnswerCache, validation: Questions, how: dict[str, Any], noise: float) -> float:
    """By the rule that thresholds are chosen by: of those that are not worse by more than noise the least."""
    points = []
    for veto in VETOES:
        found = cache.answers("veto, validation", validation, **how, veto=veto)
        right = tuple(answer.exact for answer in found.answers)
        points.append(Point(found.deferral_rate, veto, found.score, found.deferral_rate, right=right))
    best = max(points, key=lambda point: point.score)
    return min(point.threshold for point in points if within_noise(point, best, noise))


def sampled_row(cache: AnswerCache, questions: Questions, validation: Questions, samples: int) -> tuple[int, Result]:
    """What as many steps of a single model buy: the likeliest of several samples of the best member.

    Args:
        cache: of the models as they came.

    Returns:
        The lane that is best alone on the validation questions, and its answers.
    """
    scores = {
        lane: cache.answers("alone, validation", validation, member=lane).score for lane in range(BASE, cache.members)
    }
    best = max(scores, key=lambda lane: (scores[lane], -lane))
    return best, cache.answers("samples", questions, member=best, samples=samples)

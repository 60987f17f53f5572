"""The curves as PNG. matplotlib is loaded late: a machine that only serves lacks it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import TrainingError


def plot_scores(
    file: Path, curves: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, tuple[float, float]]
) -> None:
    """Score against measured deferral rate, both 0 to 1: lines, and single points with their names.

    Raises:
        TrainingError: matplotlib is not installed. The numbers are in the JSON beside the plot anyway.
    """
    pyplot = _pyplot(file)
    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for name, curve in curves.items():
        ordered = sorted(curve)
        axes.plot([rate for rate, _ in ordered], [score for _, score in ordered], marker=".", label=name)
    markers = "sDv^P*Xo<>"
    for number, (name, (rate, score)) in enumerate(points.items()):
        axes.plot([rate], [score], markers[number % len(markers)], color="black", fillstyle="none", label=name)
    axes.set(xlabel="deferral rate (expert tokens / completion tokens)", ylabel="exact match", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(pyplot, figure, file)


def plot_reliability(file: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """Share of tokens that need an expert against the gate's probability; a gate to be believed lies on the diagonal.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    pyplot = _pyplot(file)
    figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.plot([point["probability"] for point in curve], [point["needed"] for point in curve], marker="o")
    axes.set(xlabel="deferral probability", ylabel="share of tokens that need an expert", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    _save(pyplot, figure, file)


def _pyplot(file: Path) -> Any:
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError as error:
        raise TrainingError(f"{file}: plots need the package matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _save(pyplot: Any, figure: Any, file: Path) -> None:
    part = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, file)
    pyplot.close(figure)

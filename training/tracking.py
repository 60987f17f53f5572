"""Trackers: what training, calibration and evaluation measure, told to TensorBoard or Weights & Biases.

One setting chooses, ``track.to``; each tracker's package is imported when it is used first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import SettingsError
from training.settings import Settings

FOLDER = "track"
Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step's number and its values by name."""


def nothing(_step: int, _values: Mapping[str, float]) -> None:
    """The log of who tracks nothing."""


@contextmanager
def tracked(settings: Settings, run: str) -> Iterator[Log]:
    """The log of a run, closed in the end. A run that goes on from a checkpoint goes on in its log.

    Args:
        run: its name, such as "train/collm-0"; TensorBoard has a folder of that name below ``out/track``.

    Raises:
        SettingsError: the tracker's package is not installed.
    """
    track = settings.track
    if track.to is None:
        yield nothing
    elif track.to == "tensorboard":
        with _tensorboard(settings.out / FOLDER / run) as log:
            yield log
    else:
        with _wandb(settings, run) as log:
            yield log


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Log]:
    writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(settings: Settings, run: str) -> Iterator[Log]:
    folder = settings.out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    started = _package("wandb", "wandb").init(
        project=settings.track.project,
        name=run,
        id=run.replace("/", "-"),
        resume="allow",
        dir=str(folder),
        mode="offline" if settings.track.offline else "online",
        config=settings.model_dump(mode="json"),
    )
    try:
        yield lambda step, values: started.log(dict(values), step=step)
    finally:
        started.finish()


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(f'track.to = "{name}": needs the package {name}: pip install {name}') from error


def check_tracker(settings: Settings) -> None:
    """Find out before the first long stage whether the tracker is installed.

    Raises:
        SettingsError: it is not.
    """
    if settings.track.to is not None:
        _package(settings.track.to, settings.track.to)

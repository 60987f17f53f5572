"""What each process of a training runs in ``test_together``: one training after the other, so that they start once.

``python -m tests.training.together FOLDER[@STEP]...``: a project's settings, and the step to be stopped at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from training.__main__ import main


class Stopped(Exception):
    """The training was to be stopped here."""


def stopped_at(last: int) -> Any:
    """``AdamW.step``, which raises at its call number ``last``, counted from 0."""
    step, calls = torch.optim.AdamW.step, iter(range(last + 1))

    def stopping(self: torch.optim.AdamW, *args: Any) -> Any:
        if next(calls) == last:
            raise Stopped
        return step(self, *args)

    return stopping


def _train(folder: str, stop: str) -> None:
    before = torch.optim.AdamW.step
    if stop:
        torch.optim.AdamW.step = stopped_at(int(stop))  # type: ignore[method-assign]
    try:
        if main(["train", "--config", str(Path(folder) / "project.toml")]) != 0:
            sys.exit(1)
    except Stopped:
        assert stop
    finally:
        torch.optim.AdamW.step = before  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        name, _, step = argument.partition("@")
        _train(name, step)

"""Progress on standard error, so that standard output stays clean."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """A bar of ``total`` steps, and what is being done now."""

    def __init__(self, total: int, name: str) -> None:
        self._bar = tqdm(total=total, desc=name, file=sys.stderr, unit="step", dynamic_ncols=True)

    def say(self, what: str) -> None:
        """Show what is being done now."""
        self._bar.set_postfix_str(what)

    def step(self) -> None:
        """One step is done."""
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

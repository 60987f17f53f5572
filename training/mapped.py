"""Tables on disk that are memory-mapped: what a stage reads of them is in memory, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Table:
    """Numbers in rows of one width, without a header, one row after another.

    Attributes:
        rows: how many there are, or will be.
        width: numbers per row.
    """

    file: Path
    rows: int
    width: int
    dtype: torch.dtype

    def opened(self, *, to_write: bool = False) -> torch.Tensor:
        """The table [rows, width], mapped. What is written to it is in the file, which is made if it is not there."""
        if to_write:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        size = self.rows * self.width
        flat = torch.from_file(str(self.file), shared=to_write, size=size, dtype=self.dtype)
        return flat.view(self.rows, self.width)

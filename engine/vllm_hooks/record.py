"""What the LM head reads of scored positions, written to disk by the worker: for training a gate.

Hidden states are too many for messages between processes. So the worker that holds the logits writes them, each into
its own row of a table that is memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import RecordConfig
from engine.gates import FEATURES, distribution_features

HIDDEN_FILE, FEATURES_FILE = "hidden.bin", "features.bin"


def row_name(first: int, position: int) -> str:
    """A request's id that says in which row the first scored position of its text is to be written.

    Args:
        first: that row.
        position: number of the first scored token.
    """
    # Positions of different texts never have one row, but two texts may begin before it by as much.
    return f"{first}:{first - position}"


def row_of(request_id: str, position: int) -> int:
    """The row of a position of a request that ``row_name`` named."""
    return int(request_id.rpartition(":")[2]) + position


class Recorder:
    """Writes hidden states [rows, D] and features [rows, F] in float32 below the folder of ``config``.

    Args:
        width: D.
    """

    def __init__(self, config: RecordConfig, width: int) -> None:
        folder = Path(config.folder)
        dtype: torch.dtype = getattr(torch, config.dtype)
        self._hidden_ND = _mapped(folder / HIDDEN_FILE, config.rows, width, dtype)
        self._features_NF = _mapped(folder / FEATURES_FILE, config.rows, len(FEATURES), torch.float32)

    def features(self, logits_AV: torch.Tensor) -> torch.Tensor:
        """Of the distributions at asked positions [A, F]."""
        return distribution_features(FEATURES, logits_AV)

    def write(self, rows: Sequence[int], hidden_AD: torch.Tensor, features_AF: torch.Tensor) -> None:
        """Write rows. One that is computed twice, since its request was preempted, is written twice."""
        rows_A = torch.tensor(rows)
        self._hidden_ND[rows_A] = hidden_AD.cpu().to(self._hidden_ND.dtype)
        self._features_NF[rows_A] = features_AF.cpu()


def _mapped(file: Path, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(file), shared=True, size=rows * width, dtype=dtype).view(rows, width)

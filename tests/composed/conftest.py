"""Compositions of random members, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.composed.checkpoints import PLANS, save_composition

# The models are so small that a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the composition of that name in ``PLANS``."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_composition(tmp_path_factory.mktemp("composed"), PLANS[name])
        return made[name]

    return get

"""A whole training project with tiny random models, and an engine that is the stand-in: seconds, no vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.training.builders import FakePair, TinyProject

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def tiny(tmp_path: Path) -> TinyProject:
    return TinyProject.make(tmp_path)


@pytest.fixture
def fake_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine: ``calibrate`` and ``evaluate`` ask a ``FakePair``."""
    monkeypatch.setattr("training.serving.Pair", FakePair)

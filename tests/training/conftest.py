"""A whole training project with tiny random models, and an engine that is the stand-in: seconds, no vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.builders import TinyProject

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def tiny(tmp_path: Path) -> TinyProject:
    return TinyProject.make(tmp_path)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in '{"prompt": "a", "completion": "b"}'.splitlines()]

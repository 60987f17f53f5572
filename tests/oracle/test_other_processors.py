"""Engine and oracle tests with the processor's newer vector units switched off, as far as the libraries allow it.

oneDNN, ATen and MKL choose their kernels by the processor when they are loaded, and each has a variable for the highest
instruction set that it may take. vLLM's own kernels have none: they are chosen by what the processor has.

inductor's cache is another one for each: its keys leave ATen's variable out, so that C++ generated for AVX2 would be
compiled without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT

RESTRICTED = {
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE4": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("units", RESTRICTED)
def test_engine_and_oracle_tests_pass(units: str, tmp_path: Path) -> None:
    # The tests below have processes of their own, also where this one runs in one of pytest-xdist's.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = inherited | RESTRICTED[units] | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    capability = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert capability == {"AVX2": "AVX2", "SSE4": "DEFAULT"}[units]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "tests/engine", "tests/oracle"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:]

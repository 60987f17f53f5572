"""The search for secrets in committed files (make secrets) can fail, and is part of what CI runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.sources import ROOT

HOOK = Path(sys.executable).parent / "detect-secrets-hook"


def hook(file: Path) -> int:
    return subprocess.run([HOOK, "--no-verify", file], capture_output=True, timeout=120, check=False).returncode


@pytest.mark.parametrize(
    "line",
    [
        "aws_access_key_id = AK" + "IAIOSFODNN7EXAMPLF",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        'key = "sk-' + "9f2aXq7Lk3Zt8Wv1Bn5T" + "T3Blbk" + 'FJ4Hs6Yd0Gc2Jr9Pm8Ue"',
        "COLLM_API_" + 'KEY = "correct-horse-battery"',
    ],
)
def test_a_secret_is_found(tmp_path: Path, line: str) -> None:
    file = tmp_path / "settings.py"
    file.write_text("x = 1\n")
    assert hook(file) == 0
    file.write_text(f"x = 1\n{line}\n")
    assert hook(file) == 1


def test_ci_looks_for_them() -> None:
    assert "\nstep make secrets\n" in (ROOT / ".ci/run").read_text()

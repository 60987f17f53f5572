"""A back end "cpu" for Triton whose kernels run in Triton's own interpreter.

vLLM's V2 model runner is made of Triton kernels, and its CPU build looks for this back end. What it computes with it is
right, and some thousand times slower than compiled. Triton and vLLM find it by their entry points for such.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import client, supervisor
from engine.vllm_hooks.options import is_cpu_build
from tests.packaging.sources import ROOT


def _python_path(folder: Path) -> str:
    described = folder / "collm_tests_triton_on_cpu-0.dist-info"
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: collm-tests-triton-on-cpu\nVersion: 0\n")
    plugin = f"collm_tests = {__name__}.interpreter:mend"
    (described / "entry_points.txt").write_text(
        f"[triton.backends]\ncpu = {__name__}\n\n[vllm.general_plugins]\n{plugin}\n"
    )
    return os.pathsep.join([str(folder), str(ROOT)])


@contextmanager
def interpreted(folder: Path) -> Iterator[None]:
    """Engines that start inside have Triton, which those on a GPU have anyway.

    Args:
        folder: an own one, in which the back end is described.
    """
    if not is_cpu_build():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", _python_path(folder))
        patch.setenv("TRITON_INTERPRET", "1")
        # What they import is not what the other engines are forked from has imported.
        patch.setattr(client, "EngineProcess", supervisor.EngineProcess)
        yield

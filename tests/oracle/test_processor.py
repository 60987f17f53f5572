"""Data types that the processor computes slowly are said at start."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.offline import Engine
from engine.vllm_hooks.processor import COMPUTED_WRONG, is_slow, suited, vector_units
from tests.oracle.pairs import DEMO

X86 = ("x86_64", "AMD64")


@pytest.mark.skipif(platform.machine() not in X86, reason="other architectures are not judged")
@pytest.mark.parametrize(
    ("capability", "units", "slow"),
    [("DEFAULT", "none", True), ("AVX2", "AVX2", True), ("AVX512", "AVX512", False)],
)
def test_half_precision_is_slow_without_avx512(
    capability: str, units: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert vector_units().removesuffix(", bfloat16") == units
    assert is_slow(torch.bfloat16) == is_slow(torch.float16) == slow
    assert not is_slow(torch.float32)


@pytest.mark.parametrize("family", COMPUTED_WRONG)
def test_a_family_that_is_computed_wrongly_is_refused(family: str) -> None:
    model: Any = SimpleNamespace(hf_text_config=SimpleNamespace(model_type=family))
    with pytest.raises(ConfigError, match=rf"^base\.model: .* family {family} wrongly on a CPU"):
        suited("base", {}, model)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="only a CPU lane is judged")
@pytest.mark.skipif(platform.machine() not in X86, reason="other architectures are not judged")
def test_a_slow_data_type_is_taken_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    half = tmp_path / "half"
    shutil.copytree(DEMO / "base", half)
    fields = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**fields, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))

    def lane(model: Path, **vllm: str) -> dict[str, Any]:
        return {"model": str(model), "kv_cache_memory_bytes": 1 << 24, "vllm": vllm}

    config = {"base": lane(half), "experts": [{"name": "codes", **lane(DEMO / "codes", dtype="bfloat16")}]}
    lines: list[str] = []
    with Engine(EngineConfig.model_validate(config), on_progress=lines.append):
        pass
    assert [line for line in lines if "slower" in line or "faster" in line] == [
        "base: computes in float32, many times faster than bfloat16 on this processor (AVX2);"
        " its weights take twice the memory",
        "codes computes in bfloat16, which this processor (AVX2) does many times slower than float32:"
        ' set experts.codes.vllm.dtype to "float32" unless memory is short',
    ]

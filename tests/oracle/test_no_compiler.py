"""Nothing that a request asks for is compiled while it is served: no compiler is needed, no folder to write to."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec, StructuredOutputs
from tests.oracle import pairs
from tests.oracle.checks import assert_empty


# Without a compiler it is also seen that nothing was to be put there, so the second case can wait.
@pytest.mark.parametrize("missing", ["compiler", pytest.param("cache", marks=pytest.mark.slow)])
def test_without(
    missing: str,
    random_pair: pairs.Served,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch would compile with is missing, or where it would put the result takes nothing."""
    if missing == "compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    else:
        # Importing vLLM makes the folder, so there must be one.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/sys")
    plain = SamplingSpec(temperature=0.0, max_tokens=8, logprobs=2, prompt_logprobs=1)
    sampled = msgspec.structs.replace(plain, temperature=1.0, top_p=0.9, top_k=20, min_p=0.01)
    kinds = [
        plain,
        msgspec.structs.replace(sampled, seed=1),
        msgspec.structs.replace(
            sampled, presence_penalty=1.0, repetition_penalty=1.1, logit_bias={5: 1.0}, min_tokens=2
        ),
        msgspec.structs.replace(plain, structured_outputs=StructuredOutputs(regex="[ab]{8}")),
    ]
    requests = [
        GenerationRequest(f"{number}", prompt, sampling, Collaboration(policy="random", rate=0.5))
        for number, (prompt, sampling) in enumerate(zip(prompts, kinds, strict=False))
    ]
    with Engine(random_pair.config()) as engine:
        completions = engine.generate(requests)
        assert_empty(engine)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.error is None
        assert completion.logprobs is not None
        assert [len(entry.token_ids) for entry in completion.logprobs] == [3] * len(completion.tokens)
        assert completion.prompt_logprobs is not None
        assert len(completion.prompt_logprobs) == len(request.prompt) - 1
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [], "something was compiled"

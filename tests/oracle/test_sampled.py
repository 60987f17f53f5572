"""Sampled decoding, token for token: the loops of the oracle and the engine draw with the same noise."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec, StructuredOutputs
from tests.oracle import pairs
from tests.oracle.blend_loop import Method, decode, regex_form

FORM = "[a-f]{4}(-[0-9]{2}){1,3}"
PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 5},
    "min_p and both": {"min_p": 0.05, "top_k": 20, "top_p": 0.9},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    "bias and min_tokens": {"logit_bias": {0: 12.0, 17: 4.0}, "min_tokens": 9},
    "form": {"form": FORM},
    "form, min_tokens and min_p": {"form": FORM, "min_tokens": 9, "min_p": 0.1},
}


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_equals_the_oracle(
    parameters: dict[str, Any], plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]
) -> None:
    rest = {name: value for name, value in parameters.items() if name != "form"}
    chosen, seeds = prompts[:6], [7 * number for number in range(6)]
    tokenizer = Tokenizer.from_file(str(random_pair.base / "tokenizer.json"))
    pieces = [None, *(tokenizer.decode([token]) for token in range(1, 512))]
    pattern = parameters.get("form")
    expected = decode(
        Method(random_pair.reference, policy="sample"),
        chosen,
        24,
        seeds=seeds,
        temperature=1.3,
        form=regex_form(pattern, pieces) if pattern else None,
        **rest,
    )
    sampling = SamplingSpec(
        temperature=1.3,
        max_tokens=24,
        structured_outputs=StructuredOutputs(regex=pattern) if pattern else None,
        logprobs=0,
        **rest,
    )
    completions = plain_engine.generate(
        GenerationRequest(
            f"{number}", prompt, msgspec.structs.replace(sampling, seed=seed), Collaboration(policy="sample")
        )
        for number, (prompt, seed) in enumerate(zip(chosen, seeds, strict=True))
    )
    assert {source for one in expected for source in one.sources} == {0, 1}
    for completion, want in zip(completions, expected, strict=True):
        assert completion.error is None
        assert (completion.tokens, completion.sources) == (want.tokens, want.sources)
        assert completion.finish_reason == want.finish_reason
        assert completion.deferrals == pytest.approx(want.deferrals, abs=1e-3)
        assert completion.logprobs is not None
        assert [found.logprobs[0] for found in completion.logprobs] == pytest.approx(want.logprobs, abs=1e-3)

"""Requests with blends, and what the float32 loops of ``blend_loop`` write for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.blends import Blend
from engine.types import BLEND, Collaboration, Completion, GenerationRequest, SamplingSpec, StructuredOutputs
from tests.oracle import blend_loop, pairs
from tests.oracle.blend_loop import Blended, Form, Method, decode
from tests.oracle.checks import LOG_PROBABILITY

LOOPS: dict[str, blend_loop.Blend] = {
    "mixture": blend_loop.Blend("mixture", ((0, 0.4), (1, 0.6))),
    "mixture of three": blend_loop.Blend("mixture", ((0, 0.2), (1, 0.3), (2, 0.5))),
    "mixture by the gate": blend_loop.Blend("mixture", "gate"),
    "proxy": blend_loop.proxy(0.7),
    "contrastive": blend_loop.contrastive(),
    "union": blend_loop.Blend("union", ((0, 0.5), (2, 0.5)), top=5),
}
EXPERTS = 2
PATTERN = "[a-f ]{12,30}"

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.3},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "penalties, sampled": {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "bias": {"temperature": 1.0, "logit_bias": {7: 3.0, 300: 4.0, 0: -100.0}},
    "min_p": {"temperature": 1.6, "min_p": 0.1},
    "top_k, top_p": {"temperature": 1.6, "top_k": 4, "top_p": 0.8},
    "min_tokens": {"temperature": 0.0, "min_tokens": 15, "logit_bias": {0: 6.0}},
    "grammar": {"temperature": 1.0, "regex": PATTERN},
}


def engine_blend(loop: blend_loop.Blend) -> Blend:
    """The same for the engine."""
    if loop.weights == "gate":
        return Blend("mixture", tuple((lane, 1.0) for lane in range(EXPERTS + 1)), from_gate=True)
    weights = tuple(sorted(loop.weights))
    return Blend(loop.kind, weights, anchor=loop.anchor, plausibility=loop.plausibility, top=loop.top or 10)


def requests(
    prompts: Sequence[list[int]], blend: Blend | None, tag: str = "", /, *, tokens: int = 24, **fields: Any
) -> list[GenerationRequest]:
    """One for each prompt, by its number as the seed; ``fields`` are the collaboration's and the sampling's."""
    how = {name: fields.pop(name) for name in list(fields) if name in Collaboration.__struct_fields__}
    if (regex := fields.pop("regex", None)) is not None:
        fields["structured_outputs"] = StructuredOutputs(regex=regex)
    collaboration = Collaboration(**{"policy": "always", "blend": blend, **how})
    return [
        GenerationRequest(
            f"{tag}-{number}", prompt, SamplingSpec(seed=number, max_tokens=tokens, **fields), collaboration
        )
        for number, prompt in enumerate(prompts)
    ]


def looped(
    pair: pairs.Served,
    loop: blend_loop.Blend | None,
    prompts: Sequence[list[int]],
    form: Form | None = None,
    *,
    tokens: int = 24,
    **fields: Any,
) -> list[Blended]:
    """What the oracle writes for :func:`requests`."""
    by_method = {name: fields.pop(name) for name in ("policy", "threshold", "rate") if name in fields}
    fields.pop("run_ahead", None)
    pattern = fields.pop("regex", None)
    seeds = list(range(len(prompts)))
    method = Method(pair.reference, loop, **by_method)
    return decode(method, prompts, tokens, seeds=seeds, form=form if pattern else None, **fields)


def same(got: Sequence[Completion], want: Sequence[Blended], tolerance: float = LOG_PROBABILITY) -> None:
    """Token for token, with the same sources, and each member's log-probability of each token."""
    for number, (one, expected) in enumerate(zip(got, want, strict=True)):
        assert one.error is None
        assert (number, one.tokens) == (number, expected.tokens)
        assert one.sources == expected.sources
        assert one.finish_reason == expected.finish_reason
        blended = [index for index, source in enumerate(one.sources) if source == BLEND]
        assert [index for index, _ in one.support] == blended
        for index, support in one.support:
            told = expected.support[index]
            assert told is not None
            # Relative where a token is improbable: what float32 rounds in other shapes of a batch.
            assert support == pytest.approx([told[lane] for lane in sorted(told)], abs=tolerance, rel=2e-5)
        if one.logprobs is not None:
            assert [entry.logprobs[0] for entry in one.logprobs] == pytest.approx(expected.logprobs, abs=1e-3)
            for entry, row in zip(one.logprobs, expected.rows, strict=True):
                top = row.topk(len(entry.logprobs) - 1).values.tolist()
                # What is ruled out lies 10,000 lower, where float32 has steps of 0.001.
                assert entry.logprobs[1:] == pytest.approx(top, abs=1e-3, rel=1e-5)

"""Sampling: seeds reproduce, and the tokens' frequencies are the mixture that the policy says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import frequencies_pvalue, preemptions
from tests.oracle.reference import next_token_distributions

DRAWS = 4000
LEVEL = 1e-4
"""A fair sampler fails a chi-square test one time in 1 / LEVEL; the seeds are fixed, so it fails never or always."""


def test_seed_alone_and_in_a_batch(plain_engine: Engine, prompts: list[list[int]]) -> None:
    def request(tag: str, number: int) -> GenerationRequest:
        return GenerationRequest(
            f"{tag}-{number}",
            prompts[number],
            SamplingSpec(temperature=1.0, max_tokens=24, seed=number),
            Collaboration(policy="sample"),
        )

    batch = plain_engine.generate(request("batch", number) for number in range(32))
    alone = [plain_engine.generate([request("alone", number)])[0] for number in range(32)]
    assert [(one.tokens, one.sources) for one in batch] == [(one.tokens, one.sources) for one in alone]
    other = plain_engine.generate(
        GenerationRequest(
            f"other-{number}",
            prompts[number],
            SamplingSpec(temperature=1.0, max_tokens=24, seed=number + 1),
            Collaboration(policy="sample"),
        )
        for number in range(32)
    )
    assert [one.tokens for one in other] != [one.tokens for one in batch]


@pytest.mark.parametrize(
    "settings",
    [pairs.PRESSED, pytest.param(pairs.TIGHT, marks=pytest.mark.slow)],
    ids=["pressed", "tight, with prefix caching"],
)
def test_seed_survives_preemption(
    settings: dict[str, Any], engine_of: Callable[..., Engine], plain_engine: Engine, prompts: list[list[int]]
) -> None:
    """Recomputed positions draw what they drew before."""
    requests = [
        GenerationRequest(
            f"{number}",
            prompt,
            SamplingSpec(temperature=1.0, max_tokens=50, seed=number, ignore_eos=True),
            Collaboration(policy="sample"),
        )
        for number, prompt in enumerate(prompts[:32])
    ]
    plenty = plain_engine.generate(requests)
    engine = engine_of(**settings)
    before = preemptions(engine)
    tight = engine.generate(requests)
    assert all(now > then for now, then in zip(preemptions(engine), before, strict=True))
    assert [(one.tokens, one.sources) for one in tight] == [(one.tokens, one.sources) for one in plenty]


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("collaboration", [Collaboration(policy="sample"), Collaboration(policy="random", rate=0.4)])
def test_frequencies_are_the_mixture(
    collaboration: Collaboration,
    seeded: bool,
    plain_engine: Engine,
    random_pair: pairs.Served,
    prompts: list[list[int]],
) -> None:
    """P(x) = (1 - P(Z)) P_base(x) + P(Z) P_expert(x), and P(x | source) is that model's own.

    Without a seed the run cannot be repeated; what is tested is then a fair draw, that fails one time in 1 / LEVEL.
    """
    pair = random_pair.reference
    temperature = 2.0  # the random weights are wide: this makes some dozens of tokens likely

    def flat(probabilities: torch.Tensor) -> torch.Tensor:
        return torch.softmax(probabilities.clamp_min(1e-30).log() / temperature, -1)

    def gate_is_undecided(prompt: list[int]) -> bool:
        return 0.3 < next_token_distributions(pair, prompt)[2][1] < 0.7

    prompt = next(prompt for prompt in prompts if gate_is_undecided(prompt))
    base, (expert,), share = next_token_distributions(pair, prompt)
    rate = share[1] if collaboration.policy == "sample" else collaboration.rate
    completions = plain_engine.generate(
        GenerationRequest(
            f"draw-{number}",
            prompt,
            SamplingSpec(temperature=temperature, max_tokens=1, seed=number if seeded else None),
            collaboration,
        )
        for number in range(DRAWS)
    )
    counts = torch.zeros(2, len(base))
    for completion in completions:
        counts[completion.sources[0], completion.tokens[0]] += 1
    probabilities = torch.stack([(1 - rate) * flat(base), rate * flat(expert)])
    # Cells (source, token) that are too rare for a chi-square test are counted together.
    common = probabilities * DRAWS >= 8
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([probabilities[common], probabilities[~common].sum()[None]])
    assert len(wanted) > 20
    assert frequencies_pvalue(observed.tolist(), wanted.tolist()) > LEVEL

"""Steps that are launched before the last ones are read change when things are computed, never what is written.

A CPU computes a step while it is launched, so nothing is gained here; what is planned, told, cut and thrown away is the
same as on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from engine.blends import Blend
from engine.offline import Engine
from engine.types import Collaboration, Completion, GenerationRequest, SamplingSpec, StructuredOutputs
from tests.oracle.checks import assert_empty, assert_same, run
from tests.oracle.pairs import CHUNKED, TIGHT
from tests.oracle.reference import Written

IN_FLIGHT: dict[str, Any] = {"scheduler": {"steps_in_flight": 2}, **CHUNKED, **TIGHT}


def mixed(prompts: list[list[int]], count: int, *, most_tokens: int = 49) -> list[GenerationRequest]:
    """Whatever depends on the tokens before a position, and whatever does not."""
    dice = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.8, "top_k": 40},
        {"logprobs": 3},
        {"prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"min_tokens": 20},
        {"bad_words": ((17,), (40, 41))},
        {"stop_token_ids": tuple(range(100, 140))},
        {"structured_outputs": StructuredOutputs(regex="[a-c]{5}-[0-9]{30}")},
        {"allowed_token_ids": tuple(range(1, 60))},
    ]
    ways: list[dict[str, Any]] = [
        {},
        {"run_ahead": "off"},
        {"run_ahead": 3},
        {"policy": "random", "rate": 0.3},
        {"policy": "always", "max_expert_tokens": 5},
        {"policy": "confidence", "threshold": 0.5},
        {"member": 1},
        {"member": 0},
        {"blend": Blend("product", ((0, 0.5), (1, 1.0)))},
        {"regret": 0.4},
        {"regret": 0.5, "run_ahead": 3},
    ]
    return [
        GenerationRequest(
            f"mixed-{number}",
            prompts[number % len(prompts)],
            SamplingSpec(
                temperature=dice.choice((0.0, 1.0)),
                seed=number,
                max_tokens=dice.randrange(1, most_tokens + 1),
                **dice.choice(kinds),
            ),
            Collaboration(**dice.choice(ways)),
        )
        for number in range(count)
    ]


def said(completion: Completion) -> tuple[Any, ...]:
    return (
        completion.tokens,
        completion.sources,
        completion.finish_reason,
        completion.error,
        [each.token_ids for each in completion.logprobs or []],
    )


def test_greedy_equals_the_oracle(
    engine_of: Callable[..., Engine], prompts: list[list[int]], written: list[Written]
) -> None:
    engine = engine_of(**IN_FLIGHT)
    sampling = SamplingSpec(temperature=0.0, max_tokens=50)
    requests = [GenerationRequest(f"greedy-{number}", prompt, sampling) for number, prompt in enumerate(prompts)]
    assert_same(run(engine, requests, 32), written)
    assert_same(run(engine, requests[:5], 1), written[:5])
    assert min(lane.preemptions for lane in assert_empty(engine).lanes) > 0


def test_all_kinds_of_requests_as_one_step_at_a_time(
    engine_of: Callable[..., Engine], plain_engine: Engine, prompts: list[list[int]]
) -> None:
    requests = mixed(prompts, 96)
    expected = list(map(said, run(plain_engine, requests, 32)))
    engine = engine_of(**IN_FLIGHT)
    for concurrency in (32, 7):
        for number, (completion, want) in enumerate(zip(run(engine, requests, concurrency), expected, strict=True)):
            assert (number, *said(completion)) == (number, *want)


def test_a_row_is_computed_past_its_sample(engine_of: Callable[..., Engine], prompts: list[list[int]]) -> None:
    """Alone, each token's step is followed by one that nobody has asked for yet: the last one is in vain."""
    engine = engine_of(**IN_FLIGHT)
    before = assert_empty(engine).lanes[0].steps
    sampling = SamplingSpec(temperature=0.0, max_tokens=20, ignore_eos=True)
    engine.generate([GenerationRequest("alone", prompts[0][:8], sampling, Collaboration(policy="never"))])
    assert assert_empty(engine).lanes[0].steps - before == 20 + 1

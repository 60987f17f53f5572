"""UniTE over several vocabularies on real engines: token for token what a plain loop writes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest

from engine.blends import Blend
from engine.offline import Engine
from engine.types import BLEND, Collaboration, GenerationRequest, SamplingSpec
from tests.oracle.checks import assert_empty
from tests.oracle.spelled import PROMPTS, SpelledPair, spelled_pair
from tests.oracle.unions_loop import Written, write

NEAR = 1e-5
"""Strings that came so near another one may differ by the rounding of another batch shape."""
HALF = ((0, 0.5), (1, 0.5))
VARIETY: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "score": "first", "align": False},
    {"temperature": 0.0, "policy": "random", "rate": 0.5, "run_ahead": 5},
    {"temperature": 0.0, "weights": ((0, 0.2), (1, 0.8)), "min_tokens": 12, "top": 3, "run_ahead": 9},
    {"temperature": 0.0, "weights": ((1, 1.0),), "policy": "confidence", "threshold": 0.6},
    {"temperature": 1.0},
    {"temperature": 0.7, "policy": "random", "rate": 0.7, "top_k": 5, "score": "first"},
    {"temperature": 1.2, "align": False, "ignore_eos": True, "top_p": 0.8, "max_expert_tokens": 9},
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SpelledPair:
    return spelled_pair(tmp_path_factory.mktemp("unions"), 2)


@pytest.fixture(scope="module")
def engine(pair: SpelledPair) -> Iterator[Engine]:
    with Engine(pair.pressed()) as started:
        yield started


def asked(pair: SpelledPair, number: int, text: str, **fields: Any) -> GenerationRequest:
    base, *others = pair.encoded(text)
    of_blend = {name: fields.pop(name) for name in ("top", "score", "align") if name in fields}
    blend = Blend("union", fields.pop("weights", HALF), **of_blend)
    of_collaboration = ("policy", "rate", "threshold", "max_expert_tokens", "run_ahead")
    collaboration = {name: fields.pop(name) for name in of_collaboration if name in fields}
    return GenerationRequest(
        f"{number}",
        base,
        SamplingSpec(**{"max_tokens": 24, "seed": number, "temperature": 0.0, **fields}),
        Collaboration(
            policy=collaboration.pop("policy", "always"),
            prompts=tuple(enumerate(others, 1)),
            blend=blend,
            **collaboration,
        ),
    )


def expected(pair: SpelledPair, request: GenerationRequest) -> Written:
    return write(pair.members(request), request)


def test_token_for_token(pair: SpelledPair, engine: Engine) -> None:
    """All at once, in chunks, preempted, in batches of any shape, with drafts of any number."""
    kinds = [(text, fields) for fields in VARIETY for text in PROMPTS]
    random.Random(1).shuffle(kinds)
    requests = [asked(pair, number, text, **fields) for number, (text, fields) in enumerate(kinds)]
    before = engine.stats
    unaligned = agreed = several = compared = 0
    for got, request in zip(engine.generate(requests), requests, strict=True):
        wanted = expected(pair, request)
        assert got.error is None
        if got.tokens != wanted.tokens and min(wanted.margins, default=1.0) < NEAR:
            continue
        compared += 1
        assert (got.tokens, got.sources) == (wanted.tokens, wanted.sources)
        assert got.finish_reason == wanted.finish_reason
        assert [at for at, _ in got.support] == [at for at, _ in wanted.support]
        for (_, said), (_, heard) in zip(got.support, wanted.support, strict=True):
            assert said == pytest.approx(heard, abs=2e-3)
        unaligned += wanted.unaligned
        agreed += wanted.agreed
        several += wanted.sources.count(BLEND) - len(wanted.support)
    assert compared >= len(requests) - 1
    if compared == len(requests):
        assert engine.stats.unaligned_deferrals - before.unaligned_deferrals == unaligned
    assert unaligned > 2
    assert agreed > 2
    assert several > 2, "no string was several tokens of the base"
    assert sum(lane.preemptions for lane in engine.stats.lanes) > 0, "nothing was computed over again"
    assert engine.stats.integrity_errors == 0


def test_drafts_change_nothing_and_spare_the_expert_s_steps(pair: SpelledPair, engine: Engine) -> None:
    def steps() -> int:
        return engine.stats.lanes[1].steps

    texts, taken = [], []
    for drafts in ("off", 7):
        before = steps()
        asks = [
            asked(pair, number, text, weights=((0, 0.9), (1, 0.1)), run_ahead=drafts, max_tokens=32)
            for number, text in enumerate(PROMPTS)
        ]
        texts.append([one.tokens for one in engine.generate(asks)])
        taken.append(steps() - before)
    assert texts[0] == texts[1]
    assert taken[1] < 0.7 * taken[0], taken


def test_what_strings_cannot_give_is_refused(pair: SpelledPair, engine: Engine) -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"logprobs": 0}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}},
        {"weights": ((0, 0.5),)}, {"weights": ((0, 0.5), (2, 0.5))},
    )  # fmt: skip
    got = engine.generate([asked(pair, number, "a", **fields) for number, fields in enumerate(refused)])
    assert all(one.error is not None and one.error.startswith("blend: ") for one in got)
    mixture = asked(pair, 9, "a")
    blend = Blend("mixture", HALF)
    collaboration = Collaboration(prompts=mixture.collaboration.prompts, blend=blend)
    (other,) = engine.generate([GenerationRequest("m", mixture.prompt, SamplingSpec(), collaboration)])
    assert "only a union can be written" in str(other.error)


def test_an_abort_leaves_nothing(pair: SpelledPair, engine: Engine) -> None:
    async def cut_off(request: GenerationRequest, after: int) -> None:
        seen = 0
        async with aclosing(engine.client.generate(request)) as deltas:
            async for delta in deltas:
                seen += len(delta.tokens)
                if seen >= after:
                    return

    async def some() -> None:
        asks = [
            asked(pair, n, PROMPTS[n % 4], max_tokens=40, ignore_eos=True, run_ahead=(7, "off", "auto")[n % 3])
            for n in range(24)
        ]
        await asyncio.gather(*(cut_off(request, n % 7) for n, request in enumerate(asks)))

    engine._call(some())
    assert_empty(engine)

"""Members that write by characters: served, symbol for symbol what a plain loop writes, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from engine import draws
from engine.offline import Engine
from engine.types import Collaboration, Completion, GenerationRequest, SamplingSpec
from tests.oracle.characters_loop import Member, Written, write
from tests.oracle.checks import assert_empty
from tests.oracle.spelled import PROMPTS, SpelledPair, spelled_pair

NEAR = 1e-5
"""Symbols that came so near another one may differ by the rounding of another batch shape."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SpelledPair:
    return spelled_pair(tmp_path_factory.mktemp("spelled"), 2)


@pytest.fixture(scope="module")
def engine(pair: SpelledPair) -> Iterator[Engine]:
    with Engine(pair.pressed()) as started:
        yield started


def asked(pair: SpelledPair, number: int, text: str, **fields: Any) -> GenerationRequest:
    base, *others = pair.encoded(text)
    collaboration = {name: fields.pop(name) for name in ("weights", "average") if name in fields}
    sampling = {"max_tokens": 20, "seed": number, **fields}
    return GenerationRequest(
        f"{number}",
        base,
        SamplingSpec(**sampling),
        Collaboration(strategy="characters", prompts=tuple(enumerate(others, 1)), **collaboration),
    )


def expected(pair: SpelledPair, request: GenerationRequest) -> Written:
    sampling, collaboration = request.sampling, request.collaboration
    weights = dict(collaboration.weights or [(lane, 1 / len(pair.models)) for lane in range(len(pair.models))])
    lanes = [lane for lane in range(len(pair.models)) if weights.get(lane)]
    everybody = pair.members(request)
    return write(
        [everybody[lane] for lane in lanes],
        [weights[lane] for lane in lanes],
        draw=lambda index: draws.uniform(sampling.seed or 0, draws.SYMBOL_STREAM, index),
        temperature=sampling.temperature,
        average=collaboration.average,
        max_pieces=sampling.max_tokens,
        min_pieces=sampling.min_tokens,
    )


def check(got: Completion, wanted: Written) -> bool:
    """Whether all of it was compared: not where a symbol came too near another one to be told from it."""
    assert got.error is None
    if b"".join(got.texts) != b"".join(wanted.pieces) and min(wanted.margins) < NEAR:
        return False
    assert got.texts == wanted.pieces
    assert got.finish_reason == wanted.finish_reason
    return True


VARIETY: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "weights": ((0, 0.8), (1, 0.2))},
    {"temperature": 1.0, "average": "geometric"},
    {"temperature": 0.0, "average": "geometric", "weights": ((0, 0.3), (1, 0.7))},
    {"temperature": 1.0, "weights": ((1, 1.0),)},
    {"temperature": 1.0, "min_tokens": 12},
    {"temperature": 0.0, "weights": ((0, 1.0),)},
)


def test_symbol_for_symbol(pair: SpelledPair, engine: Engine) -> None:
    """All at once, in chunks, in batches of any shape, with memory for few of them (how many are preempted depends on
    how they arrive; tests/engine/test_characters.py preempts any row at any moment).
    """
    kinds = [(text, fields) for fields in VARIETY for text in PROMPTS]
    random.Random(1).shuffle(kinds)
    requests = [asked(pair, number, text, **fields) for number, (text, fields) in enumerate(kinds)]
    got = engine.generate(requests)
    compared = sum(check(one, expected(pair, request)) for one, request in zip(got, requests, strict=True))
    assert compared >= len(requests) - 2
    assert engine.stats.integrity_errors == 0
    assert len({one.sources[0] for one in got}) == 2, "nobody but one member wrote"


def test_the_text_does_not_depend_on_company(pair: SpelledPair, engine: Engine) -> None:
    requests = [asked(pair, number, PROMPTS[number], temperature=1.0, max_tokens=12) for number in range(3)]
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    assert [one.texts for one in together] == [one.texts for one in alone]


def test_what_only_tokens_can_give_is_refused(pair: SpelledPair, engine: Engine) -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"logprobs": 0}, {"top_k": 3}, {"top_p": 0.9}, {"logit_bias": {3: 1.0}}, {"stop_token_ids": (3,)},
        {"weights": ((0, 0.5),)}, {"weights": ((0, 0.5), (2, 0.5))}, {"weights": ((0, 1.5), (1, -0.5))},
    )  # fmt: skip
    got = engine.generate([asked(pair, number, "a", **fields) for number, fields in enumerate(refused)])
    assert all(one.error is not None and "characters: " in one.error for one in got)
    (lacking,) = engine.generate([GenerationRequest("x", [5], SamplingSpec(), Collaboration(strategy="characters"))])
    assert "expert1 has no prompt in tokens of its own" in str(lacking.error)
    (other,) = engine.generate([GenerationRequest("y", [5], SamplingSpec(), Collaboration(strategy="deferral"))])
    assert "expert1 has no prompt in tokens of its own" in str(other.error)


def test_members_alone_are_served_in_their_own_tokens(pair: SpelledPair, engine: Engine) -> None:
    for lane, tokenizer in enumerate(pair.tokenizers):
        prompt = tokenizer.encode("Question: What", add_special_tokens=False).ids
        request = GenerationRequest(
            f"m{lane}", prompt, SamplingSpec(temperature=0.0, max_tokens=6), Collaboration(lane)
        )
        (got,) = engine.generate([request])
        loop = Member(pair.models[lane], tokenizer, pair.ends[lane], prompt)
        for token in got.tokens:
            table = loop.dictionary()
            own = loop.bytes_of.get(token, b"")
            assert table[own] == max(table.values())
            loop.strand.append(token)


@pytest.mark.slow
def test_weight_1_is_the_member_s_own_sampling(pair: SpelledPair, engine: Engine) -> None:
    """Chi-square of first pieces against the float32 model's distribution, over 1,500 seeds."""
    count = 1500
    asks = [asked(pair, n, PROMPTS[0], max_tokens=1, weights=((1, 1.0),), temperature=1.0) for n in range(count)]
    got = Counter(b"".join(one.texts) for one in engine.generate(asks))
    member = Member(pair.models[1], pair.tokenizers[1], pair.ends[1], asks[0].prompt_of(1))
    table = member.dictionary()
    common = [data for data, chance in table.items() if chance * count >= 5]
    rest = 1 - sum(table[data] for data in common)
    observed = [*(got[data] for data in common), count - sum(got[data] for data in common)]
    assert len(common) > 20
    result = chisquare(observed, [count * share for share in (*(table[data] for data in common), rest)])
    assert result.pvalue > 1e-3


def test_an_abort_leaves_nothing(pair: SpelledPair, engine: Engine) -> None:
    async def cut_off(request: GenerationRequest, after: int) -> None:
        seen = 0
        async with aclosing(engine.client.generate(request)) as deltas:
            async for delta in deltas:
                seen += len(delta.texts)
                if seen >= after:
                    return

    async def some() -> None:
        asks = [asked(pair, n, PROMPTS[n % 4], max_tokens=40, temperature=1.0, ignore_eos=True) for n in range(24)]
        await asyncio.gather(*(cut_off(request, n % 7) for n, request in enumerate(asks)))

    engine._call(some())
    assert_empty(engine)


@pytest.mark.slow
def test_equal_checkpoints_write_that_member(tmp_path: Path) -> None:
    """Two members of one checkpoint, one vocabulary: greedy, the same pieces as the member by itself."""
    twins = spelled_pair(tmp_path, 2, same=True)
    with Engine(twins.config()) as engine:
        assert engine.info.vocabularies == "same"
        assert engine.info.strategies == ("deferral", "characters")
        for temperature in (0.0, 1.0):
            both = [asked(twins, n, text, temperature=temperature) for n, text in enumerate(PROMPTS)]
            one = [
                asked(twins, n, text, temperature=temperature, weights=((0, 1.0),)) for n, text in enumerate(PROMPTS)
            ]
            loops = [expected(twins, request) for request in one]
            got = engine.generate(one)
            for twin, single, loop in zip(engine.generate(both), got, loops, strict=True):
                assert check(single, loop)
                if all(piece.decode("utf-8", "ignore").encode() == piece for piece in single.texts):
                    assert twin.texts == single.texts
        assert engine.stats.integrity_errors == 0

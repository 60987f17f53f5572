"""Deferral over several vocabularies on real engines: token for token what a plain loop writes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle.spelled import PROMPTS, SpelledPair, spelled_pair
from tests.oracle.words_loop import Written, write

VARIETY: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "policy": "always"},
    {"temperature": 0.0, "policy": "random", "rate": 0.5},
    {"temperature": 0.0, "policy": "confidence", "threshold": 0.6, "min_tokens": 12},
    {"temperature": 1.0, "policy": "always"},
    {"temperature": 0.7, "policy": "random", "rate": 0.7, "top_k": 20},
    {"temperature": 1.0, "policy": "confidence", "threshold": 0.4, "max_expert_tokens": 7},
    {"temperature": 1.2, "policy": "always", "ignore_eos": True, "top_p": 0.9},
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SpelledPair:
    return spelled_pair(tmp_path_factory.mktemp("words"), 2)


@pytest.fixture(scope="module")
def engine(pair: SpelledPair) -> Iterator[Engine]:
    with Engine(pair.pressed()) as started:
        yield started


def asked(pair: SpelledPair, number: int, text: str, **fields: Any) -> GenerationRequest:
    base, *others = pair.encoded(text)
    of_collaboration = ("policy", "rate", "threshold", "max_expert_tokens", "experts", "member")
    collaboration = {name: fields.pop(name) for name in of_collaboration if name in fields}
    return GenerationRequest(
        f"{number}",
        base,
        SamplingSpec(**{"max_tokens": 30, "seed": number, **fields}),
        Collaboration(prompts=tuple(enumerate(others, 1)), **collaboration),
    )


def expected(pair: SpelledPair, request: GenerationRequest) -> Written:
    return write(pair.members(request), request)


def test_token_for_token(pair: SpelledPair, engine: Engine) -> None:
    """All at once, in chunks, preempted, in batches of any shape; and nobody asked for a strategy."""
    assert engine.info.strategies[0] == "deferral"
    kinds = [(text, fields) for fields in VARIETY for text in PROMPTS]
    random.Random(1).shuffle(kinds)
    requests = [asked(pair, number, text, **fields) for number, (text, fields) in enumerate(kinds)]
    before = engine.stats.unaligned_deferrals
    unaligned = 0
    words = []
    for got, request in zip(engine.generate(requests), requests, strict=True):
        wanted = expected(pair, request)
        assert got.error is None
        assert (got.tokens, got.sources) == (wanted.tokens, wanted.sources)
        assert got.finish_reason == wanted.finish_reason
        assert [(word.start, word.length, word.source) for word in got.words] == [
            (word.start, word.length, word.source) for word in wanted.words
        ]
        assert [word.logprob for word in got.words] == pytest.approx([word.logprob for word in wanted.words], abs=1e-3)
        unaligned += wanted.unaligned
        words += wanted.words
    assert engine.stats.unaligned_deferrals - before == unaligned > 0
    assert sum(word.length > 1 for word in words) > 10
    assert sum(lane.preemptions for lane in engine.stats.lanes) > 0, "nothing was computed over again"
    assert engine.stats.integrity_errors == 0


def test_a_threshold_of_one_is_the_base(pair: SpelledPair, engine: Engine) -> None:
    for number, text in enumerate(PROMPTS):
        fields = {"temperature": 1.0, "max_tokens": 16}
        joint = asked(pair, number, text, policy="confidence", threshold=1.0, **fields)
        alone = GenerationRequest(f"alone{number}", joint.prompt, joint.sampling, Collaboration(member=0))
        got, wanted = engine.generate([joint, alone])
        assert (got.tokens, got.sources) == (wanted.tokens, [0] * len(wanted.tokens))


def test_what_names_tokens_is_refused(pair: SpelledPair, engine: Engine) -> None:
    (got,) = engine.generate([asked(pair, 0, "a", logprobs=0)])
    assert got.error == "logprobs: cannot be served by members of different vocabularies"

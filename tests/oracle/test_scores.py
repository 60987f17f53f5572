"""Scores of the joint model in real lanes, against the float32 loops of ``blend_loop``, whatever the lanes do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch

from engine.blends import Blend
from engine.client import EngineClient
from engine.offline import Engine
from engine.types import BASE, Collaboration, Completion, GenerationRequest, SamplingSpec
from tests.oracle import blend_loop, pairs
from tests.oracle.blend_loop import Method, scores
from tests.oracle.checks import LOG_PROBABILITY, assert_empty
from tests.oracle.pairs import CHUNKED

RULED_OUT = -1000.0
"""Tokens that a blend rules out lie 10,000 lower, or are impossible: the loop makes no difference."""
EXPERTS = 2
MIXTURE = ((0, 0.2), (1, 0.3), (2, 0.5))

CASES: dict[str, tuple[tuple[blend_loop.Policy, blend_loop.Blend | None], dict[str, Any]]] = {
    "marginal over the gate": (("sample", None), {}),
    "always": (("always", None), {"policy": "always"}),
    "confidence": (("confidence", None), {"policy": "confidence", "threshold": 0.5}),
    "never": (("never", None), {"policy": "never"}),
    "mixture": (
        ("always", blend_loop.Blend("mixture", MIXTURE)),
        {"policy": "always", "blend": Blend("mixture", MIXTURE)},
    ),
    # The gate's probability is that of the members, so all of them take part.
    "union where the gate asks": (
        ("threshold", blend_loop.Blend("union", MIXTURE, top=5)),
        {"policy": "threshold", "blend": Blend("union", MIXTURE, top=5)},
    ),
    "contrastive": (
        ("always", blend_loop.contrastive()),
        {"policy": "always", "blend": Blend("product", ((0, -0.5), (1, 1.5)), anchor=1, plausibility=0.1)},
    ),
}


def loops(pair: pairs.Served, case: str, texts: Sequence[list[int]]) -> list[list[float]]:
    (policy, blend), _ = CASES[case]
    return [scores(Method(pair.reference, blend, policy), text) for text in texts]


def asked(case: str, texts: Sequence[list[int]], tag: str = "", logprobs: int = 0) -> list[GenerationRequest]:
    _, fields = CASES[case]
    return [
        GenerationRequest(
            f"{tag}{case}-{number}",
            text,
            SamplingSpec(seed=0, prompt_logprobs=logprobs),
            Collaboration(**fields),
            scores=True,
        )
        for number, text in enumerate(texts)
    ]


def same(got: Sequence[Completion], texts: Sequence[list[int]], expected: Sequence[list[float]]) -> None:
    for one, text, want in zip(got, texts, expected, strict=True):
        assert one.error is None
        assert one.tokens == []
        assert one.finish_reason == "length"
        assert one.prompt_logprobs is not None
        assert [entry.token_ids[0] for entry in one.prompt_logprobs] == text[1:]
        found = [max(entry.logprobs[0], RULED_OUT) for entry in one.prompt_logprobs]
        wanted = [max(value, RULED_OUT) for value in want]
        # Relative where a token is improbable: what float32 rounds in other shapes of a batch.
        assert found == pytest.approx(wanted, abs=LOG_PROBABILITY, rel=2e-5)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> pairs.Served:
    return pairs.random_pair(tmp_path_factory.mktemp("scored"), EXPERTS, related=True)


@pytest.fixture(scope="module")
def engine(served: pairs.Served) -> Iterator[Engine]:
    with Engine(served.config()) as engine:
        yield engine


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> list[list[int]]:
    """Of one window, of three, and some that end with one."""
    longest = [token for prompt in prompts for token in prompt][:140]
    return [longest, longest[:65], longest[50:116], prompts[0][:2], *(text for text in prompts[1:3] if len(text) > 1)]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(served: pairs.Served, engine: Engine, texts: list[list[int]], case: str) -> None:
    expected = loops(served, case, texts)
    same(engine.generate(asked(case, texts)), texts, expected)
    # Beside others that write, and others that are scored by another rule.
    writing = [
        GenerationRequest(f"w{number}", text[:100], SamplingSpec(seed=number, max_tokens=12))
        for number, text in enumerate(texts)
    ]
    mixed = [*asked(case, texts, "again "), *asked("always", texts, "beside "), *writing]
    same(engine.generate(mixed)[: len(texts)], texts, expected)
    assert_empty(engine)


def test_the_most_probable_tokens(served: pairs.Served, engine: Engine, texts: list[list[int]]) -> None:
    """They are the blend's, and the text's own token has its rank among them."""
    (got,) = engine.generate(asked("mixture", texts[1:2], "top ", logprobs=5))
    assert got.prompt_logprobs is not None
    (policy, blend), _ = CASES["mixture"]
    method = Method(served.reference, blend, policy)
    for position, entry in list(enumerate(got.prompt_logprobs, 1))[::7]:
        row = blend_row(method, texts[1][:position])
        assert entry.logprobs[1:] == pytest.approx(row.topk(5).values.tolist(), abs=LOG_PROBABILITY)
        assert entry.rank == int((row >= row[texts[1][position]]).sum())


@pytest.mark.parametrize(
    "settings",
    [
        # Just over the 5 blocks of 32 tokens that one text needs: no order spares all of them a preemption.
        pytest.param({**CHUNKED, "kv_blocks": (8, 7)}, id="chunked, tight"),
        pytest.param(
            {"enable_prefix_caching": False, "scheduler": {"gather": 4}},
            id="no prefix caching, gather",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_way_of_computing(settings: dict[str, Any], served: pairs.Served, prompts: list[list[int]]) -> None:
    everything = [token for prompt in prompts for token in prompt]
    many = [everything[begin : begin + 130] for begin in range(0, 240, 30)]
    with Engine(served.config(**settings)) as engine:
        for case in ("union where the gate asks", "confidence"):
            same(engine.generate(asked(case, many)), many, loops(served, case, many))
        stats = assert_empty(engine)
        if "kv_blocks" in settings:
            assert sum(lane.preemptions for lane in stats.lanes) > 0, "nothing was computed over again"


@pytest.mark.slow
def test_worker_processes(served: pairs.Served, texts: list[list[int]]) -> None:
    """Members in processes of their own, which hand over their distributions in shared memory."""
    with Engine(served.config(executor="mp", coordination="overlapped")) as engine:
        for case in CASES:
            same(engine.generate(asked(case, texts)), texts, loops(served, case, texts))
        assert_empty(engine)


def test_abandoned_at_any_moment(engine: Engine, texts: list[list[int]]) -> None:
    async def abandon(client: EngineClient, number: int) -> None:
        (request,) = asked(list(CASES)[number % len(CASES)], texts[:1], f"left {number} ")
        stream = client.generate(request)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.002 * number):
                async for _ in stream:
                    pass
        await stream.aclose()  # type: ignore[attr-defined]

    async def all_of_them(client: EngineClient) -> None:
        await asyncio.gather(*(abandon(client, number) for number in range(24)))

    asyncio.run_coroutine_threadsafe(all_of_them(engine.client), engine._loop).result(timeout=300)
    assert_empty(engine)


@torch.inference_mode()
def blend_row(method: Method, prefix: list[int]) -> torch.Tensor:
    """Log-probabilities [V] after a prefix."""
    (look,) = method.look([{BASE: prefix}], [[]], [0])
    return look.row.double().log_softmax(-1)

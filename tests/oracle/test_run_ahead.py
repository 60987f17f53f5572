"""Run-ahead and gather change when things are computed, never what is written.

The pair is one whose models often agree, so that windows stand, are cut, and stand in part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from engine.offline import Engine
from engine.stats import EngineStats
from engine.types import Collaboration, Completion, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import assert_empty, assert_same, frequencies_pvalue, run
from tests.oracle.pairs import CHUNKED, OVERLAPPED, TIGHT
from tests.oracle.reference import Written, greedy, hidden_and_logits

CHUNKED_AND_TIGHT = {**CHUNKED, **TIGHT}

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1 draft": ({"run_ahead": 1, "gather": "off"}, {}),
    "4 drafts": ({"run_ahead": 4, "gather": "off"}, {}),
    "16 drafts, gather 28": ({"run_ahead": 16, "gather": 28}, {"enable_prefix_caching": False}),
    "automatic": ({"run_ahead": "auto", "gather": "auto"}, {}),
    "no run-ahead, gather 8": ({"run_ahead": "off", "gather": 8}, {}),
    "4 drafts, chunked prefill, tight KV": ({"run_ahead": 4, "gather": "off"}, CHUNKED_AND_TIGHT),
    "automatic, chunked prefill, tight KV": ({"run_ahead": "auto"}, CHUNKED_AND_TIGHT),
    "4 drafts, overlapped": ({"run_ahead": 4}, OVERLAPPED),
    "automatic, overlapped, tight KV": ({"run_ahead": "auto"}, {**OVERLAPPED, **CHUNKED_AND_TIGHT}),
}


SLOW = (
    "1 draft",
    "4 drafts",
    "16 drafts, gather 28",
    "no run-ahead, gather 8",
    "automatic, chunked prefill, tight KV",
    "automatic, overlapped, tight KV",
)
"""Each takes an engine of its own; what they combine is tested apart by the others."""

GATHER = 12
"""Rows that an expert's step waits for in the engine that the tests below share."""


@pytest.fixture(scope="module")
def related_pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Served:
    return pairs.random_pair(tmp_path_factory.mktemp("related-pair"), related=True)


@pytest.fixture(scope="module")
def expected(related_pair: pairs.Served, prompts: list[list[int]]) -> list[Written]:
    return [greedy(related_pair.reference, prompt, 50) for prompt in prompts[:32]]


@pytest.fixture(scope="module")
def engine(related_pair: pairs.Served) -> Iterator[Engine]:
    # A fixed number of rows, so that windows grow in batches too, whatever steps cost just now.
    scheduler = {"run_ahead": "off", "gather": GATHER, "gather_max_wait_seconds": 60.0}
    with Engine(related_pair.config(scheduler=scheduler)) as engine:
        engine.generate([GenerationRequest("first", [1], SamplingSpec(max_tokens=1))])
        yield engine


def greedy_requests(prompts: list[list[int]], tag: str, **collaboration: Any) -> list[GenerationRequest]:
    sampling = SamplingSpec(temperature=0.0, max_tokens=50)
    how = Collaboration(**collaboration)
    return [GenerationRequest(f"{tag}-{number}", prompt, sampling, how) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("scheduler", "lanes"),
    [
        pytest.param(*settings, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, settings in SETTINGS.items()
    ],
)
def test_greedy_equals_the_oracle(
    scheduler: dict[str, Any],
    lanes: dict[str, Any],
    related_pair: pairs.Served,
    prompts: list[list[int]],
    expected: list[Written],
) -> None:
    with Engine(related_pair.config(scheduler=scheduler, **lanes)) as engine:
        assert_same(run(engine, greedy_requests(prompts[:32], "batch"), 32), expected)
        stats = assert_empty(engine)
        if scheduler["run_ahead"] == "off":
            assert stats.runahead_accepted == stats.runahead_discarded == 0
        else:
            assert stats.runahead_accepted > 0
            assert stats.runahead_discarded > 0
        if "kv_blocks" in lanes:
            assert min(lane.preemptions for lane in stats.lanes) > 0
        # The second time the prefix cache knows all of it, asked positions included.
        assert_same(run(engine, greedy_requests(prompts[:8], "alone"), 1), expected[:8])
        assert_empty(engine)


def expert_visits(engine: Engine, requests: list[GenerationRequest]) -> tuple[list[Completion], float]:
    """The completions, alone one after the other, and the expert's steps per token that it wrote."""
    before = steps_of(engine)
    done = run(engine, requests, 1)
    return done, (steps_of(engine) - before) / sum(sum(map(bool, one.sources)) for one in done)


def steps_of(engine: Engine) -> int:
    stats: EngineStats = assert_empty(engine)
    return stats.lanes[1].steps


def test_a_request_chooses_for_itself_and_saves_visits(
    engine: Engine, prompts: list[list[int]], expected: list[Written]
) -> None:
    without, visits_without = expert_visits(engine, greedy_requests(prompts[:12], "off"))
    within, visits_within = expert_visits(engine, greedy_requests(prompts[:12], "on", run_ahead=6))
    assert_same(without, expected[:12])
    assert_same(within, expected[:12])
    assert visits_without >= 1
    assert visits_within < 0.85 * visits_without


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSpec(temperature=1.0),
        SamplingSpec(temperature=0.7, top_p=0.8, logprobs=3),
        SamplingSpec(temperature=2.0, top_k=5, min_tokens=10),
    ],
    ids=["plain", "top_p and logprobs", "top_k and min_tokens"],
)
def test_same_seed_same_answer(sampling: SamplingSpec, engine: Engine, prompts: list[list[int]]) -> None:
    """Sampled answers too are, token for token, those of step-by-step decoding; alone and in a mixed batch."""

    def requests(tag: str, run_ahead: Any) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                f"{tag}-{number}",
                prompt,
                msgspec.structs.replace(sampling, seed=number, max_tokens=30),
                Collaboration(policy="sample" if number % 2 else "threshold", run_ahead=run_ahead),
            )
            for number, prompt in enumerate(prompts[:16])
        ]

    plain = engine.generate(requests("off", "off"))
    before = assert_empty(engine)
    mixed = engine.generate([*requests("six", 6), *requests("auto", "auto")])
    after = assert_empty(engine)
    assert after.runahead_accepted > before.runahead_accepted
    assert after.runahead_discarded > before.runahead_discarded
    alone = run(engine, requests("alone", 3), 1)
    for others in (mixed[:16], mixed[16:], alone):
        assert [(one.tokens, one.sources) for one in others] == [(one.tokens, one.sources) for one in plain]
        if sampling.logprobs is None:
            continue
        for one, other in zip(plain, others, strict=True):
            assert one.logprobs is not None
            assert other.logprobs is not None
            for mine, its in zip(one.logprobs, other.logprobs, strict=True):
                assert mine.token_ids == its.token_ids
                assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-3)


def test_frequencies_of_pairs_of_tokens(engine: Engine, related_pair: pairs.Served, prompts: list[list[int]]) -> None:
    """Unseeded, both tokens the expert's, the second one decided in the same visit: P(x, y) = P(x) P(y | x)."""
    draws, level, top_k, temperature = 4000, 1e-4, 4, 2.0
    pair = related_pair.reference

    def distribution(tokens: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            _, logits = hidden_and_logits(pair.experts[0], tokens)
        top = logits.topk(top_k)
        return dict(zip(top.indices.tolist(), torch.softmax(top.values / temperature, -1).tolist(), strict=True))

    def of_pairs(prompt: list[int]) -> dict[tuple[int, int], float]:
        return {
            (one, other): probability * next_probability
            for one, probability in distribution(prompt).items()
            for other, next_probability in distribution([*prompt, one]).items()
        }

    # The prompt after which it is least clear what follows.
    prompt, wanted = max(((prompt, of_pairs(prompt)) for prompt in prompts), key=lambda item: min(item[1].values()))
    before = assert_empty(engine)
    requests = [
        GenerationRequest(
            f"draw-{number}",
            prompt,
            SamplingSpec(temperature=temperature, top_k=top_k, max_tokens=2, ignore_eos=True),
            Collaboration(policy="always", run_ahead=1),
        )
        for number in range(draws)
    ]
    # Lots smaller than the number of rows that the expert's step waits for: nothing ends a window early.
    completions = run(engine, requests, GATHER - 1)
    after = assert_empty(engine)
    stood = after.runahead_accepted - before.runahead_accepted
    cut = after.runahead_discarded - before.runahead_discarded
    # Every window was of two, and they stood often, and were cut often.
    assert stood + cut == draws
    assert min(stood, cut) > draws / 10
    counts = dict.fromkeys(wanted, 0)
    for completion in completions:
        assert completion.error is None
        counts[tuple(completion.tokens)] += 1  # type: ignore[index]
    assert min(wanted.values()) * draws > 8
    assert frequencies_pvalue(list(counts.values()), list(wanted.values())) > level


def test_drafts_that_were_cut_are_not_found_in_the_prefix_cache(
    random_pair: pairs.Served, twin_engine: Engine, prompts: list[list[int]]
) -> None:
    """A draft's block is overwritten after the cut; were its hash published, the next request with that text would
    read another text's keys and values."""
    starts = [(prompt * 28)[:28] for prompt in prompts[:8]]  # a block has 32 tokens: four drafts fill it
    pair = random_pair.reference
    drafts = [greedy(pair, start, 12, policy="never", ignore_eos=True).tokens for start in starts]
    sampling = SamplingSpec(temperature=0.0, max_tokens=20, ignore_eos=True)
    before = assert_empty(twin_engine)
    written = twin_engine.generate(
        GenerationRequest(f"cut-{number}", start, sampling, Collaboration(policy="always", experts=(1,), run_ahead=10))
        for number, start in enumerate(starts)
    )
    assert assert_empty(twin_engine).runahead_discarded - before.runahead_discarded >= 8 * len(starts)
    assert all(one.tokens[:4] != draft[:4] for one, draft in zip(written, drafts, strict=True))
    tails = [[*start, *draft] for start, draft in zip(starts, drafts, strict=True)]
    # Never defers, and tells the base's own probabilities, which show more than its tokens.
    base: dict[str, Any] = {"policy": "confidence", "threshold": 1.0}
    got = twin_engine.generate(
        GenerationRequest(f"tail-{number}", tail, sampling, Collaboration(**base)) for number, tail in enumerate(tails)
    )
    assert_same(got, [greedy(pair, tail, 20, ignore_eos=True, **base) for tail in tails])


def test_asked_positions_are_computed_though_the_prefix_cache_knows_them(
    random_pair: pairs.Served, twin_engine: Engine, prompts: list[list[int]]
) -> None:
    """The expert is the base's twin, so that every window stands, and its text is in the cache the second time."""
    starts = [(prompt * 28)[:28] for prompt in prompts[8:16]]  # not those of the test above: the cache knows them
    expected = [greedy(random_pair.reference, start, 40, policy="never").tokens for start in starts]
    sampling = SamplingSpec(temperature=0.0, max_tokens=40)
    before = assert_empty(twin_engine)
    for turn in ("first", "second"):
        got = run(
            twin_engine,
            [
                GenerationRequest(f"{turn}-{number}", start, sampling, Collaboration(policy="always", experts=(2,)))
                for number, start in enumerate(starts)
            ],
            1,
        )
        assert [one.tokens for one in got] == expected
        assert all(set(one.sources) == {2} for one in got)
        stats = assert_empty(twin_engine)
        assert stats.runahead_discarded == before.runahead_discarded
    # 12 drafts beyond the first: a visit decides 13 tokens.
    assert stats.lanes[2].steps - before.lanes[2].steps <= 2 * len(starts) * 5


def test_without_a_seed_no_two_requests_and_no_two_lanes_draw_alike(
    twin_engine: Engine, prompts: list[list[int]]
) -> None:
    """Base and twin have the same weights, so that equal noise is equal text, as the same seed shows."""

    def texts(name: str, seed: int | None) -> list[list[list[int]]]:
        """[prompt][base, base, twin, twin]"""
        sampling = SamplingSpec(temperature=2.0, max_tokens=12, seed=seed, ignore_eos=True)
        completions = twin_engine.generate(
            GenerationRequest(f"{name}-{number}-{turn}", prompt, sampling, Collaboration(member=(0, 0, 2, 2)[turn]))
            for number, prompt in enumerate(prompts[:4])
            for turn in range(4)
        )
        return [[one.tokens for one in completions[begin : begin + 4]] for begin in range(0, len(completions), 4)]

    for seeded, unseeded in zip(texts("seeded", 5), texts("unseeded", None), strict=True):
        assert len({tuple(tokens) for tokens in seeded}) == 1
        assert len({tuple(tokens) for tokens in unseeded}) == 4

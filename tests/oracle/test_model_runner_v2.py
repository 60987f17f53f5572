"""Lanes on vLLM's V2 model runner write what they write on V1, to the token.

The runner's kernels run in Triton's interpreter here, some ten tokens a second: texts are short.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import CollmError
from engine.offline import Engine
from engine.types import Collaboration, Completion, GenerationRequest, SamplingSpec
from engine.vllm_hooks.load import make_plan
from tests.oracle import pairs
from tests.oracle.checks import LOG_PROBABILITY, abandon_at_any_moment, assert_empty, assert_same, run
from tests.oracle.reference import greedy
from tests.oracle.test_steps_in_flight import mixed, said
from tests.oracle.triton_on_cpu import interpreted

PRESSED: dict[str, Any] = {"max_num_batched_tokens": 32, "max_num_seqs": 16, "kv_blocks": (7, 6)}
"""Prompts come in chunks, and a handful of requests fills the KV cache."""
V2: dict[str, Any] = {"model_runner": "v2", "run_ahead": 3, "gather": "off"}


def started(served: pairs.Served, folder: Path, **scheduler: Any) -> Engine:
    with interpreted(folder):
        return Engine(served.config(scheduler={**V2, **scheduler}, **PRESSED))


@pytest.fixture(scope="module")
def related_pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Served:
    """Its models often agree, so that windows stand, are cut, and stand in part."""
    return pairs.random_pair(tmp_path_factory.mktemp("related-pair"), related=True)


@pytest.fixture(scope="module")
def engine(related_pair: pairs.Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with started(related_pair, tmp_path_factory.mktemp("triton")) as engine:
        yield engine


def test_greedy_equals_the_oracle(engine: Engine, related_pair: pairs.Served, prompts: list[list[int]]) -> None:
    """Deferral by the gate, run-ahead, prompts in chunks, preemptions; the second time the prefix cache knows it."""
    # All of them fill a block of 32 tokens while they write, and there are not two blocks for each.
    short = [prompt[:26] for prompt in prompts if len(prompt) >= 26][:7]
    sampling = SamplingSpec(temperature=0.0, max_tokens=10, ignore_eos=True)
    requests = [GenerationRequest(f"greedy-{number}", prompt, sampling) for number, prompt in enumerate(short)]
    expected = [greedy(related_pair.reference, prompt, 10, ignore_eos=True) for prompt in short]
    assert {source for one in expected for source in one.sources} == {0, 1}
    assert_same(run(engine, requests, 7), expected)
    stats = assert_empty(engine)
    assert stats.runahead_accepted > 0
    assert stats.runahead_discarded > 0
    assert max(lane.preemptions for lane in stats.lanes) > 0
    assert_same(run(engine, requests[:1], 1), expected[:1])


def assert_alike(found: Completion, expected: Completion) -> None:
    """What is written, and how probable it and the prompt were."""
    assert said(found) == said(expected)
    for which in ("logprobs", "prompt_logprobs"):
        ours, theirs = (getattr(each, which) or [] for each in (found, expected))
        assert [entry.token_ids for entry in ours] == [entry.token_ids for entry in theirs]
        for entry, want in zip(ours, theirs, strict=True):
            assert entry.logprobs == pytest.approx(want.logprobs, abs=LOG_PROBABILITY)
            assert entry.rank == want.rank


@pytest.mark.slow  # takes minutes in the interpreter
@pytest.mark.parametrize("steps_in_flight", [0, 2])
def test_all_kinds_of_requests_as_on_v1(
    steps_in_flight: int, random_pair: pairs.Served, tmp_path: Path, prompts: list[list[int]]
) -> None:
    """Penalties, biases, forms, log-probabilities, scores, blends, policies, seeds; in a batch, and preempted."""
    short = [prompt[:40] for prompt in prompts]
    scored = [
        GenerationRequest(
            f"scored-{number}",
            prompt,
            SamplingSpec(seed=0, prompt_logprobs=2),
            Collaboration(policy="always"),
            scores=True,
        )
        for number, prompt in enumerate(short[:4])
    ]
    requests = [*mixed(short, 48, most_tokens=14), *scored]
    with Engine(random_pair.config()) as engine:
        expected = run(engine, requests, 32)
    assert all(completion.error is None for completion in expected)
    with started(random_pair, tmp_path, steps_in_flight=steps_in_flight) as engine:
        for completion, want in zip(run(engine, requests, 8), expected, strict=True):
            assert_alike(completion, want)
        assert max(lane.preemptions for lane in assert_empty(engine).lanes) > 0


@pytest.mark.slow  # takes half a minute in the interpreter
def test_an_expert_in_a_process_of_its_own(
    related_pair: pairs.Served, tmp_path: Path, prompts: list[list[int]]
) -> None:
    overlapped = related_pair.config(scheduler=V2, **pairs.OVERLAPPED)
    sampling = SamplingSpec(temperature=0.0, max_tokens=10)
    requests = [GenerationRequest(f"apart-{number}", prompt, sampling) for number, prompt in enumerate(prompts[:3])]
    with interpreted(tmp_path), Engine(overlapped) as engine:
        assert_same(run(engine, requests, 3), [greedy(related_pair.reference, prompt, 10) for prompt in prompts[:3]])
        assert_empty(engine)


@pytest.mark.slow  # takes a minute in the interpreter
def test_abandoned_at_any_moment(engine: Engine, prompts: list[list[int]]) -> None:
    abandon_at_any_moment(engine, prompts, 24, seed=5)
    assert_empty(engine)
    (completion,) = engine.generate(
        [GenerationRequest("after", prompts[0], SamplingSpec(temperature=0.0, max_tokens=5, ignore_eos=True))]
    )
    assert len(completion.tokens) == 5


@pytest.mark.slow  # takes half a minute in the interpreter
def test_a_request_that_the_runners_tables_have_no_room_for(engine: Engine, prompts: list[list[int]]) -> None:
    """It is refused, and ends nothing else."""
    many = SamplingSpec(bad_words=tuple((number, number) for number in range(1, 200)))
    bad, good = engine.generate(
        [
            GenerationRequest("bad", prompts[0], many),
            GenerationRequest("good", prompts[1], SamplingSpec(temperature=0.0, max_tokens=4, ignore_eos=True)),
        ]
    )
    assert bad.error is not None
    assert "bad_words: 199 are more than the 128" in bad.error
    assert len(good.tokens) == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"base": {"executor": "ray"}}, 'base.executor: "ray" needs scheduler.model_runner = "v1"'),
        (
            {"base": {"vllm": {"logits_processors": ["somebodys:Own"]}}},
            'base.vllm.logits_processors needs scheduler.model_runner = "v1"',
        ),
        ({"base": {"adapter": "some/adapter"}}, 'base.adapter: lanes with adapters need scheduler.model_runner = "v1"'),
    ],
    ids=["ray", "logits_processors", "adapter"],
)
def test_refused_by_name(change: dict[str, Any], expected: str, random_pair: pairs.Served) -> None:
    fields = random_pair.config(scheduler=V2).model_dump()
    for table, options in change.items():
        fields[table] |= options
    with pytest.raises(CollmError) as caught:
        make_plan(EngineConfig.model_validate(fields))
    assert str(caught.value) == expected

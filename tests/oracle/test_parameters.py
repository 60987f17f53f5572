"""Sampling parameters mean the same in both lanes: every written token counts as output, whoever wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.offline import Engine
from engine.types import GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import assert_same, run
from tests.oracle.reference import Written, greedy, hidden_and_logits

PARAMETERS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.4},
    "all penalties": {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 0.8},
    "logit bias": {"logit_bias": {17: 12.0, 400: 12.0, 333: -100.0}},
    "logit bias to EOS, min_tokens": {"logit_bias": {0: 30.0}, "min_tokens": 7},
    "allowed tokens": {"allowed_token_ids": tuple(range(0, 512, 3))},
    "bad words of one token": {"bad_words": tuple((token,) for token in range(1, 512, 2))},
    "ignore_eos": {"logit_bias": {0: 8.0}, "ignore_eos": True},
}


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_equals_the_oracle(
    parameters: dict[str, Any],
    plain_engine: Engine,
    random_pair: pairs.Served,
    prompts: list[list[int]],
    written: list[Written],
) -> None:
    chosen = prompts[:12]
    plain = [one.tokens[:30] for one in written[:12]]
    expected = [greedy(random_pair.reference, prompt, 30, **parameters) for prompt in chosen]
    assert [one.tokens for one in expected] != plain, "the parameter changes nothing here"
    assert {source for one in expected for source in one.sources} == {0, 1}
    requests = [
        GenerationRequest(f"{number}", prompt, SamplingSpec(temperature=0.0, max_tokens=30, **parameters))
        for number, prompt in enumerate(chosen)
    ]
    assert_same(run(plain_engine, requests, 12), expected)


def test_bad_words_across_sources(
    plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]], written: list[Written]
) -> None:
    """A word whose tokens are written by both models is forbidden too, and a request beside it is not touched."""
    forbidden = 0
    for number, (prompt, plain) in enumerate(zip(prompts[:8], written, strict=False)):
        pairs_of_tokens = list(
            zip(plain.tokens[:20], plain.tokens[1:21], plain.sources, plain.sources[1:], strict=False)
        )
        words = tuple({(first, second) for first, second, one, other in pairs_of_tokens if one != other})[:3]
        if not words:
            continue
        forbidden += 1
        parameters: dict[str, Any] = {"bad_words": words}
        expected = greedy(random_pair.reference, prompt, 24, **parameters)
        requests = [
            GenerationRequest(f"bad-{number}", prompt, SamplingSpec(temperature=0.0, max_tokens=24, **parameters)),
            GenerationRequest(f"free-{number}", prompt, SamplingSpec(temperature=0.0, max_tokens=24)),
        ]
        bad, free = plain_engine.generate(requests)
        assert_same([bad], [expected])
        assert free.tokens == plain.tokens[:24]
        assert bad.tokens != free.tokens
        assert not set(words) & set(zip(bad.tokens, bad.tokens[1:], strict=False))
    assert forbidden >= 3


def test_stop_tokens_of_either_source(
    plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]], written: list[Written]
) -> None:
    """A stop token ends the request whichever model wrote it, and not before min_tokens."""
    stopped_by = set()
    for number, (prompt, whole) in enumerate(zip(prompts[:8], written, strict=False)):
        for index in (index for index in (4, 9, 14) if index < len(whole.tokens)):
            stop = whole.tokens[index]
            expected = greedy(random_pair.reference, prompt, 30, stop_token_ids=(stop,), min_tokens=3)
            (completion,) = plain_engine.generate(
                [
                    GenerationRequest(
                        f"stop-{number}-{index}",
                        prompt,
                        SamplingSpec(temperature=0.0, max_tokens=30, stop_token_ids=(stop,), min_tokens=3),
                    )
                ]
            )
            assert_same([completion], [expected])
            if completion.finish_reason == "stop":
                stopped_by.add(completion.sources[-1])
    assert stopped_by == {0, 1}


def test_logprobs_are_those_of_the_writer(
    plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]
) -> None:
    pair = random_pair.reference
    requests = [
        GenerationRequest(f"{number}", prompt, SamplingSpec(temperature=0.0, max_tokens=12, logprobs=count))
        for number, (prompt, count) in enumerate(zip(prompts[:4], (0, 1, 3, 5), strict=True))
    ]
    for completion, request, count in zip(plain_engine.generate(requests), requests, (0, 1, 3, 5), strict=True):
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.tokens)
        for index, (token, source, found) in enumerate(
            zip(completion.tokens, completion.sources, completion.logprobs, strict=True)
        ):
            model = pair.base if source == 0 else pair.experts[source - 1]
            logprobs = hidden_and_logits(model, request.prompt + completion.tokens[:index])[1].log_softmax(-1)
            assert found.token_ids[0] == token
            assert len(found.token_ids) == count + 1
            assert found.logprobs == pytest.approx(logprobs[found.token_ids].tolist(), abs=1e-3)
            assert found.token_ids[1:] == logprobs.topk(count).indices.tolist()
            assert found.rank == 1


@pytest.mark.parametrize("deferred", [False, True])
def test_prompt_logprobs_are_the_bases(
    deferred: bool, plain_engine: Engine, random_pair: pairs.Served, prompts: list[list[int]]
) -> None:
    """Also when the first token is deferred, and a second time, when the prompt lies in the prefix cache."""
    pair = random_pair.reference
    prompt = next(p for p in prompts if len(p) > 40 and (greedy(pair, p, 1).sources == [1]) == deferred)
    for attempt in range(2):
        (completion,) = plain_engine.generate(
            [GenerationRequest(f"{attempt}", prompt, SamplingSpec(temperature=0.0, max_tokens=2, prompt_logprobs=2))]
        )
        assert completion.prompt_logprobs is not None
        assert len(completion.prompt_logprobs) == len(prompt) - 1
        for index, found in enumerate(completion.prompt_logprobs, 1):
            logprobs = hidden_and_logits(pair.base, prompt[:index])[1].log_softmax(-1)
            assert found.token_ids[0] == prompt[index]
            assert found.logprobs == pytest.approx(logprobs[found.token_ids].tolist(), abs=1e-3)
            assert found.token_ids[1:] == logprobs.topk(2).indices.tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingSpec(temperature=3.0), "temperature"),
        (SamplingSpec(top_p=0.0), "top_p"),
        (SamplingSpec(logit_bias={512: 1.0}), "logit_bias"),
        (SamplingSpec(stop_token_ids=(10**6,)), "stop_token_ids"),
        (SamplingSpec(allowed_token_ids=(10**6,)), "allowed_token_ids"),
        (SamplingSpec(allowed_token_ids=()), "allowed_token_ids"),
        (SamplingSpec(logprobs=10**4), "logprobs"),
        (SamplingSpec(min_tokens=10**4), "min_tokens"),
        (SamplingSpec(max_tokens=0), "max_tokens"),
    ],
)
def test_a_bad_request_fails_alone(
    sampling: SamplingSpec, expected: str, plain_engine: Engine, prompts: list[list[int]]
) -> None:
    good = SamplingSpec(temperature=0.0, max_tokens=5, ignore_eos=True)
    bad, fine = plain_engine.generate(
        [GenerationRequest("bad", prompts[0], sampling), GenerationRequest("good", prompts[1], good)]
    )
    assert (bad.finish_reason, bad.tokens) == ("error", [])
    assert bad.error is not None
    assert expected in bad.error
    assert len(fine.tokens) == 5


@pytest.mark.parametrize("prompt", [[], [512], [-1], [1] * 192])
def test_a_bad_prompt_fails_alone(prompt: list[int], plain_engine: Engine) -> None:
    (bad,) = plain_engine.generate([GenerationRequest("bad", prompt)])
    assert bad.error is not None
    assert "prompt" in bad.error

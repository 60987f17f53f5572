"""The oracle of blends against what must hold of any: no engine here."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch

from tests.oracle.blend_loop import (
    BASE,
    BLEND,
    NEGATIVE,
    Blend,
    Blended,
    Method,
    combine,
    contrastive,
    decode,
    guidance,
    next_rows,
    proxy,
    regex_form,
    scores,
)
from tests.oracle.checks import frequencies_pvalue
from tests.oracle.reference import Pair, greedy, hidden_and_logits, next_token_distributions
from tests.oracle.tiny import VOCAB, tiny_pair

SAMPLED: dict[str, Any] = {"temperature": 1.5, "seeds": [3, 4, 5, 6]}
HALF = Blend("mixture", ((0, 0.5), (1, 0.5)))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair(layers=1)


PROMPTS = [[5, 9, 2], [7], list(range(1, 20)), [33, 33, 8, 60]]


def texts(done: list[Blended]) -> list[list[int]]:
    return [one.tokens for one in done]


def alone(pair: Pair, model: Any, **settings: Any) -> list[list[int]]:
    only = Pair(model, pair.experts, pair.theta, pair.bias, pair.eos)
    return texts(decode(Method(only, policy="never"), PROMPTS, 12, **settings))


def written(pair: Pair, blend: Blend, **settings: Any) -> list[list[int]]:
    return texts(decode(Method(pair, blend), PROMPTS, 12, **settings))


@pytest.fixture(params=[{}, SAMPLED], ids=["greedy", "sampled"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def test_prefixes_of_any_length_in_one_pass(pair: Pair) -> None:
    with torch.inference_mode():
        hidden, logits = next_rows(pair.base, PROMPTS)
        for n, prompt in enumerate(PROMPTS):
            one = hidden_and_logits(pair.base, prompt)
            assert torch.allclose(hidden[n], one[0], atol=1e-5)
            assert torch.allclose(logits[n], one[1], atol=1e-4)


def test_deferral_is_that_of_the_other_oracle(pair: Pair) -> None:
    done = decode(Method(pair, policy="threshold", threshold=0.6), PROMPTS, 12)
    expected = [greedy(pair, prompt, 12, threshold=0.6) for prompt in PROMPTS]
    assert [(one.tokens, one.sources) for one in done] == [(one.tokens, one.sources) for one in expected]
    assert {source for one in done for source in one.sources} >= {0, 1}


@pytest.mark.parametrize("kind", ["mixture", "product", "union"])
def test_all_weight_on_one_member_is_that_member(kind: Any, pair: Pair, settings: dict[str, Any]) -> None:
    def one_hot(member: int) -> Blend:
        return Blend(kind, tuple((m, float(m == member)) for m in range(3)), top=VOCAB)

    assert written(pair, one_hot(0), **settings) == alone(pair, pair.base, **settings)
    assert written(pair, one_hot(1), **settings) == alone(pair, pair.experts[0], **settings)
    assert alone(pair, pair.base, **settings) != alone(pair, pair.experts[0], **settings)


@pytest.mark.parametrize("kind", ["mixture", "product", "union"])
def test_equal_members_are_one(kind: Any, pair: Pair, settings: dict[str, Any]) -> None:
    twins = Pair(pair.base, [pair.base, pair.base], pair.theta, pair.bias, pair.eos)
    blend = Blend(kind, ((0, 0.5), (1, 0.25), (2, 0.25)), top=VOCAB)
    assert written(twins, blend, **settings) == alone(pair, pair.base, **settings)


def test_members_may_change_places(pair: Pair, settings: dict[str, Any]) -> None:
    swapped = Pair(pair.experts[0], [pair.base, pair.experts[1]], pair.theta, pair.bias, pair.eos)
    blend, other = Blend("mixture", ((0, 0.3), (1, 0.7))), Blend("mixture", ((0, 0.7), (1, 0.3)))
    assert written(pair, blend, **settings) == written(swapped, other, **settings)


def test_a_union_of_everything_is_the_mixture(pair: Pair, settings: dict[str, Any]) -> None:
    weights = ((0, 0.5), (1, 0.3), (2, 0.2))
    whole = written(pair, Blend("union", weights, top=VOCAB), **settings)
    assert whole == written(pair, Blend("mixture", weights), **settings)
    assert whole != written(pair, Blend("union", weights, top=1), **settings)


def test_a_union_has_no_other_tokens(pair: Pair) -> None:
    with torch.inference_mode():
        rows = {m: hidden_and_logits(model, PROMPTS[0])[1] for m, model in enumerate((pair.base, *pair.experts))}
    weights = {0: 0.5, 1: 0.5}
    shares = combine(Blend("union", (), top=3), rows, weights).exp()
    inside = {*rows[0].topk(3).indices.tolist(), *rows[1].topk(3).indices.tolist()}
    assert set(shares.nonzero().flatten().tolist()) == inside
    assert float(shares.sum()) == pytest.approx(1)


def test_a_mixture_is_the_average_of_probabilities(pair: Pair) -> None:
    with torch.inference_mode():
        rows = {m: hidden_and_logits(model, PROMPTS[2])[1] for m, model in enumerate((pair.base, *pair.experts))}
    weights = {0: 0.2, 1: 0.5, 2: 0.3}
    by_hand = sum(weight * rows[m].double().softmax(-1) for m, weight in weights.items())
    assert torch.allclose(combine(Blend("mixture", ()), rows, weights).exp(), torch.as_tensor(by_hand), atol=1e-9)


def test_proxy_of_nothing_is_the_base(pair: Pair, settings: dict[str, Any]) -> None:
    base = alone(pair, pair.base, **settings)
    assert written(pair, proxy(0.0), **settings) == base
    assert written(pair, proxy(1e-30), **settings) == base
    untuned = Pair(pair.base, [pair.experts[0], pair.experts[0]], pair.theta, pair.bias, pair.eos)
    assert written(untuned, proxy(1.0), **settings) == base
    assert written(pair, proxy(1.0), **settings) != base
    # The large model is the untuned small one: what is left is the tuned one.
    small = Pair(pair.experts[1], pair.experts, pair.theta, pair.bias, pair.eos)
    assert written(small, proxy(1.0), **settings) == alone(pair, pair.experts[0], **settings)


def test_contrast_of_nothing_is_the_expert(pair: Pair, settings: dict[str, Any]) -> None:
    expert = alone(pair, pair.experts[0], **settings)
    no_mask = dataclasses.replace(contrastive(beta=0.0), plausibility=0.0)
    assert written(pair, no_mask, **settings) == expert
    # Of the most probable token alone, nothing else can be written, whatever the amateur says.
    assert written(pair, contrastive(alpha=1.0, beta=3.0), **settings) == alone(pair, pair.experts[0])
    assert written(pair, contrastive(), **settings) != expert


def test_an_implausible_token_is_written_only_where_nothing_else_is_left(pair: Pair) -> None:
    method = Method(pair, contrastive(alpha=0.9, beta=2.0))
    with torch.inference_mode():
        row = hidden_and_logits(pair.experts[0], PROMPTS[0])[1]
    order = row.argsort(descending=True).tolist()
    (one,) = decode(method, PROMPTS[:1], 1, allowed_token_ids=tuple(order[20:]))
    assert one.tokens == [order[20]], "the anchor's own order decides"
    (one,) = decode(method, PROMPTS[:1], 1, allowed_token_ids=tuple(order), logit_bias={order[20]: 100.0})
    assert one.tokens != [order[20]], "a bias does not revive it"


def test_beyond_a_union_the_mixtures_order_decides(pair: Pair) -> None:
    weights = ((0, 0.5), (1, 0.5))
    union, mixture = (Method(pair, Blend(kind, weights, top=3)) for kind in ("union", "mixture"))  # type: ignore[arg-type]
    with torch.inference_mode():
        rows = [hidden_and_logits(model, PROMPTS[0])[1] for model in (pair.base, pair.experts[0])]
    inside = {token for row in rows for token in row.topk(3).indices.tolist()}
    others = tuple(token for token in range(len(rows[0])) if token not in inside)
    (one,), (expected,) = (decode(method, PROMPTS[:1], 1, allowed_token_ids=others) for method in (union, mixture))
    assert one.tokens == expected.tokens


def test_guidance(pair: Pair, settings: dict[str, Any]) -> None:
    negative = [[11, 4], [12], [50] * 7, [1, 2, 3]]
    base = alone(pair, pair.base, **settings)
    assert written(pair, guidance(1.0), others={NEGATIVE: negative}, **settings) == base
    assert written(pair, guidance(3.0), others={NEGATIVE: PROMPTS}, **settings) == base
    # gamma 0 is the base under the negative prompt; noise and penalties are the first prompt's all the same.
    method = Method(pair, guidance(0.0))
    guided = decode(method, PROMPTS, 12, others={NEGATIVE: negative})
    under = decode(Method(pair, policy="never"), negative, 12)
    assert texts(guided) == texts(under)
    assert written(pair, guidance(2.0), others={NEGATIVE: negative}, **settings) != base


def test_a_member_may_have_its_own_prompt(pair: Pair) -> None:
    own = [[11, 4], [12], [50] * 7, [1, 2, 3]]
    blend = Blend("mixture", ((1, 1.0),))
    under = decode(Method(pair, blend), own, 12)
    assert texts(decode(Method(pair, blend), PROMPTS, 12, others={1: own})) == texts(under)


def test_the_gates_own_weights(pair: Pair, settings: dict[str, Any]) -> None:
    by_gate = Blend("mixture", "gate")
    sure = dataclasses.replace(pair, theta=torch.zeros(2, 32), bias=torch.tensor([60.0, -60.0]))
    assert written(sure, by_gate, **settings) == alone(pair, pair.experts[0], **settings)
    even = dataclasses.replace(pair, theta=torch.zeros(2, 32), bias=torch.zeros(2))
    thirds = Blend("mixture", ((0, 1 / 3), (1, 1 / 3), (2, 1 / 3)))
    assert written(even, by_gate, **settings) == written(even, thirds, **settings)


@pytest.mark.parametrize("policy", ["threshold", "confidence", "random", "sample"])
def test_the_policy_says_where(policy: Any, pair: Pair, settings: dict[str, Any]) -> None:
    """By a blend that is the expert's own, so that it must write what deferral writes, under another name."""
    one = dataclasses.replace(pair, experts=pair.experts[:1], theta=pair.theta[:1], bias=pair.bias[:1])
    rule: dict[str, Any] = {"policy": policy, "threshold": 0.6, "rate": 0.5}
    deferred = decode(Method(one, **rule), PROMPTS, 12, **settings)
    blended = decode(Method(one, Blend("mixture", ((0, 0.0), (1, 1.0))), **rule), PROMPTS, 12, **settings)
    assert texts(deferred) == texts(blended)
    assert [[-source for source in each.sources] for each in deferred] == [each.sources for each in blended]
    assert {source for each in blended for source in each.sources} == {BASE, BLEND}


def test_blended_tokens_count_as_expert_tokens(pair: Pair) -> None:
    for out in decode(Method(pair, HALF), PROMPTS, 8, max_expert_tokens=3, ignore_eos=True):
        assert out.sources == [BLEND] * 3 + [BASE] * 5


def test_support_and_logprobs_add_up(pair: Pair) -> None:
    weights = {0: 0.5, 1: 0.3, 2: 0.2}
    for out in decode(Method(pair, Blend("mixture", tuple(weights.items()))), PROMPTS, 12, **SAMPLED):
        for support, logprob, row in zip(out.support, out.logprobs, out.rows, strict=True):
            assert support is not None
            mixed = sum(weight * math.exp(support[member]) for member, weight in weights.items())
            assert logprob == pytest.approx(math.log(mixed), abs=1e-5)
            assert float(row.exp().sum()) == pytest.approx(1)
    for out in decode(Method(pair, HALF, policy="never"), PROMPTS, 4):
        assert out.support == [None] * 4


def test_the_first_tokens_frequencies_are_the_blends(pair: Pair) -> None:
    draws = 1500
    prompts, seeds = [PROMPTS[0]] * draws, list(range(draws))
    done = decode(Method(pair, HALF), prompts, 1, seeds=seeds, temperature=1.0)
    base, experts, _ = next_token_distributions(pair, PROMPTS[0])
    wanted = (base + experts[0]) / 2
    counts = Counter(one.tokens[0] for one in done)
    common = [token for token in range(VOCAB) if float(wanted[token]) * draws >= 8]
    assert len(common) > 5
    observed = [counts[token] for token in common]
    shares = [float(wanted[token]) for token in common]
    assert frequencies_pvalue([*observed, draws - sum(observed)], [*shares, 1 - sum(shares)]) > 1e-4


@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {4: 6.0, 0: -100.0}},
        {"min_p": 0.2},
        {"top_k": 2},
        {"top_p": 0.5},
        {"min_tokens": 9, "logit_bias": {0: 30.0}},
    ],
    ids=str,
)
def test_parameters_are_of_the_combined_row(parameters: dict[str, Any], pair: Pair) -> None:
    plain = decode(Method(pair, HALF), PROMPTS, 12, **SAMPLED)
    done = decode(Method(pair, HALF), PROMPTS, 12, **SAMPLED, **parameters)
    assert texts(done) != texts(plain)
    for out in done:
        for place, (token, row) in enumerate(zip(out.tokens, out.rows, strict=True)):
            flat = (row / SAMPLED["temperature"]).softmax(-1)
            if "top_k" in parameters:
                assert token in row.topk(2).indices.tolist()
            if "min_p" in parameters:
                assert flat[token] >= 0.2 * flat.max() - 1e-6
            if "top_p" in parameters:
                assert float(flat[flat > flat[token]].sum()) < 0.5
            if "min_tokens" in parameters:
                assert (token == 0) == (place == 9)
    if "min_tokens" in parameters:
        assert {out.finish_reason for out in done} == {"stop"}


def test_a_form_binds_the_blend(pair: Pair) -> None:
    form = regex_form("[b-d]{3}(xy)?", [None, *(chr(ord("a") - 1 + token) for token in range(1, VOCAB))])
    for settings in ({}, SAMPLED):
        for out in decode(Method(pair, HALF), PROMPTS, 20, form=form, **settings):
            text = out.tokens[:-1]
            assert out.finish_reason == "stop"
            assert out.tokens[-1] == 0
            assert all(token in (2, 3, 4) for token in text[:3])
            assert text[3:] in ([], [24, 25])


def test_scores(pair: Pair) -> None:
    text = [5, 9, 2, 30, 31, 7]
    with torch.inference_mode():
        rows = [next_token_distributions(pair, text[:at]) for at in range(2, len(text))]
    marginal = [
        math.log(share[0] * float(base[token]) + sum(share[k] * float(of[token]) for k, of in enumerate(experts, 1)))
        for (base, experts, share), token in zip(rows, text[2:], strict=True)
    ]
    assert scores(Method(pair, policy="sample"), text, 2) == pytest.approx(marginal, abs=1e-4)
    half = [
        math.log(0.5 * float(base[token]) + 0.5 * float(experts[0][token]))
        for (base, experts, _), token in zip(rows, text[2:], strict=True)
    ]
    assert scores(Method(pair, HALF), text, 2) == pytest.approx(half, abs=1e-4)
    base_only = [math.log(float(base[token])) for (base, _, _), token in zip(rows, text[2:], strict=True)]
    assert scores(Method(pair, HALF, policy="never"), text, 2) == pytest.approx(base_only, abs=1e-4)
    # What decoding reports of a text is what scoring that text gives.
    (out,) = decode(Method(pair, HALF), [text], 10)
    assert scores(Method(pair, HALF), text + out.tokens, len(text)) == pytest.approx(out.logprobs, abs=1e-4)

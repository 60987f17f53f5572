"""Offline blends, batched and cached, write what the oracle's plain loops write."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pycountry")

from engine.gate import GateArtifact
from tests.oracle.blend_loop import Blend, Method, contrastive, decode, proxy
from tests.oracle.reference import Pair
from tests.oracle.tiny import tiny_pair
from training.demo.blending import alone, best_of, blend, write
from training.demo.blends import Asked, by_gate
from training.demo.proxy import table

PROMPTS = [[5, 9, 2], [7], list(range(1, 20)), [33, 33, 8, 60]]
NAMES = ("base", "one", "two")
WEIGHTS = {"base": 0.5, "one": 0.3, "two": 0.2}
PROXY = {"base": 1.0, "one": 1.0, "two": -1.0}
CONTRAST = {"one": 1.5, "base": -0.5}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair(layers=2)


@pytest.fixture(scope="module")
def gate(pair: Pair) -> GateArtifact:
    return GateArtifact(theta=pair.theta, bias=pair.bias, experts=NAMES[1:], base=None, expert_identities=(None, None))


EVEN = tuple((member, weight) for member, weight in enumerate(WEIGHTS.values()))


@pytest.mark.parametrize(
    ("rule", "oracle"),
    [
        (blend("mixture", WEIGHTS), Blend("mixture", EVEN)),
        (blend("union", WEIGHTS, top=3), Blend("union", EVEN, top=3)),
        (blend("product", PROXY), proxy()),
        (blend("product", CONTRAST, anchor="one", plausibility=0.1), contrastive()),
    ],
    ids=["mixture", "union", "proxy", "contrastive"],
)
def test_rules(rule: Any, oracle: Blend, pair: Pair) -> None:
    models = dict(zip(NAMES, (pair.base, *pair.experts), strict=True))
    found, scores = write(models, rule, PROMPTS, max_tokens=12, eos=0)
    wanted = decode(Method(pair, oracle), PROMPTS, 12)
    assert found == [one.tokens for one in wanted]
    assert scores == pytest.approx([sum(one.logprobs) for one in wanted], abs=1e-3)


@pytest.mark.parametrize("policy", ["threshold", "confidence", "always"])
def test_where_a_policy_asks(policy: Any, pair: Pair, gate: GateArtifact) -> None:
    models = dict(zip(NAMES, (pair.base, *pair.experts), strict=True))
    for rule, oracle in ((None, None), (by_gate(gate, NAMES), Blend("mixture", "gate"))):
        where = Asked(gate, NAMES, "gate" if policy == "threshold" else policy, 0.6, rule)
        found, _ = write(models, where, PROMPTS, max_tokens=12, eos=0)
        wanted = decode(Method(pair, oracle, policy, threshold=0.6), PROMPTS, 12)
        assert found == [one.tokens for one in wanted]
        assert where.asked == sum(source != 0 for one in wanted for source in one.sources)
        assert where.rows == sum(len(one.tokens) for one in wanted)


def test_best_of_is_the_most_probable_sample(pair: Pair) -> None:
    settings: dict[str, Any] = {"max_tokens": 6, "eos": 0, "seed": 1}
    best = best_of(pair.base, PROMPTS, 5, **settings)
    samples, scores = write(
        {"base": pair.base}, alone("base"), [p for p in PROMPTS for _ in range(5)], temperature=1.0, **settings
    )
    for n, chosen in enumerate(best):
        own = range(5 * n, 5 * n + 5)
        assert chosen == samples[max(own, key=lambda at: scores[at])]
    assert len({tuple(sample) for sample in samples}) > len(PROMPTS)


def test_the_table_of_proxy_tuning() -> None:
    found = [
        {
            "large": {"held out": 0.0, "changed": 0.0},
            "large tuned": {"held out": 0.8, "changed": 1.0},
            "proxy": {"held out": 0.6, "changed": 0.5},
        }
    ]
    assert "| proxy | 0.600 | 0.600 | 0.75 | 0.500 | 0.500 |" in table(found)

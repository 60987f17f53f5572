"""Every family as base and as expert equals the oracle, run-ahead off and auto: one engine of each, requests say which.

``docs/models.md`` has the table of what is run here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import families, pairs
from tests.oracle.checks import assert_empty, run
from tests.oracle.reference import Pair, Written, probabilities

QUICK = ("Gemma-3", "Falcon-H1")
BY_NAME = {family.name: family for family in families.FAMILIES}


@torch.inference_mode()
def _written(pair: Pair, prompt: list[int], max_tokens: int) -> tuple[Written, float]:
    """The oracle, with logits as the model gives them (soft caps and multipliers included); and the least margin.

    The margin is how far the best logit was from the second, and the gate's value from the threshold: below the
    rounding of float32 nobody can say what is right.
    """
    out, margin = Written(), float("inf")
    seen: list[torch.Tensor] = []
    hook = pair.base.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        while len(out.tokens) < max_tokens:
            ids = torch.tensor([prompt + out.tokens])
            logits = pair.base(input_ids=ids, use_cache=False).logits[0, -1]
            share = probabilities(pair, seen.pop()[0, -1].float())
            deferral = 1.0 - share[0]
            source = int(deferral > 0.5)
            if source:
                logits = pair.experts[0](input_ids=ids, use_cache=False).logits[0, -1]
            best = logits[: families.VOCABULARY].float().topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]), 100 * abs(deferral - 0.5))
            token = int(best.indices[0])
            out.tokens.append(token)
            out.sources.append(source)
            out.deferrals.append(deferral)
            if token == pair.eos:
                out.finish_reason = "stop"
                break
    finally:
        hook.remove()
    return out, margin


def _requests(prompts: list[list[int]], run_ahead: str | int, tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"{run_ahead}-{number}",
            prompt,
            SamplingSpec(temperature=0.0, max_tokens=tokens),
            Collaboration(run_ahead=run_ahead),  # type: ignore[arg-type]
        )
        for number, prompt in enumerate(prompts)
    ]


def check(served: pairs.Served, prompts: list[list[int]], tokens: int = 40) -> Engine:
    """The pair writes what the oracle writes, with and without run-ahead; texts that rounding decides are left out."""
    expected = [_written(served.reference, prompt, tokens) for prompt in prompts]
    sure = [number for number, (_, margin) in enumerate(expected) if margin > 2e-3]
    assert len(sure) >= len(prompts) // 2, "the pair's logits lie too near each other to show anything"
    assert {source for number in sure for source in expected[number][0].sources} == {0, 1}
    with Engine(served.config()) as engine:
        for run_ahead in ("off", "auto", 4):
            found = run(engine, _requests(prompts, run_ahead, tokens), len(prompts))
            for number in sure:
                want = expected[number][0]
                got = found[number]
                assert got.error is None
                assert (run_ahead, number, got.tokens, got.sources) == (run_ahead, number, want.tokens, want.sources)
                assert got.deferrals == pytest.approx(want.deferrals, abs=1e-3)
            assert all(token < families.VOCABULARY for one in found for token in one.tokens)
        # Longer than three blocks of the prefix cache, twice: the second time there is something to be found in it.
        long = [
            [
                GenerationRequest(f"{turn}-long-{number}", (prompt * 100)[:100], SamplingSpec(0.0, max_tokens=8))
                for number, prompt in enumerate(prompts[:2])
            ]
            for turn in (1, 2)
        ]
        once, again = (run(engine, requests, 2) for requests in long)
        assert [one.error for one in once] == [None, None]
        assert [one.tokens for one in once] == [one.tokens for one in again]
        hot = engine.generate(
            GenerationRequest(f"hot-{number}", prompts[0], SamplingSpec(temperature=3.0, max_tokens=40))
            for number in range(4)
        )
        assert all(token < families.VOCABULARY for one in hot for token in one.tokens)
        assert_empty(engine)
    return engine


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in BY_NAME],
)
def test_family(name: str, prompts: list[list[int]], tmp_path: Path) -> None:
    family = BY_NAME[name]
    engine = check(families.served(family, tmp_path), prompts[:8])
    assert all(lane.can_cut for lane in engine.info.lanes) == family.drafts
    drafted = engine.stats.runahead_accepted + engine.stats.runahead_discarded
    assert (drafted > 0) == family.drafts


def test_mixture_of_experts_after_a_dense_base(prompts: list[list[int]], tmp_path: Path) -> None:
    check(families.pair_of(BY_NAME["Llama"].make(0), BY_NAME["Mixtral"].make(1), tmp_path), prompts[:6])


@pytest.mark.slow
def test_the_other_family_as_base(prompts: list[list[int]], tmp_path: Path) -> None:
    """A recurrent base with an expert that could be cut: nobody drafts."""
    served = families.pair_of(BY_NAME["Falcon-H1"].make(0), BY_NAME["Llama"].make(1), tmp_path)
    engine = check(replace(served), prompts[:6])
    assert engine.stats.runahead_accepted + engine.stats.runahead_discarded == 0


def test_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    _, after = page.split("<!-- families: made by tests/oracle/families.py -->\n")
    assert after.split("\n<!-- end of families -->")[0] == families.table()

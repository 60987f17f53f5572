"""Requests of every kind, as the scheduler's machines draw them."""

from __future__ import annotations

from typing import Literal

from hypothesis import strategies as st

from engine.blends import Blend
from engine.types import GenerationRequest
from tests.engine.builders import POLICY_NAMES, request
from tests.engine.oracle import Pair

Focus = Literal["all", "deferral", "veto", "room", "scores", "regret"]
SCORES: dict[Focus, tuple[bool, ...]] = {
    "all": (False, False, False, True),
    "deferral": (False,),
    "veto": (False,),
    "room": (False,),
    "scores": (False, True, True, True),
    "regret": (False,),
}


@st.composite
def blends(draw: st.DrawFn, pair: Pair) -> Blend:
    """Now and then one that is refused."""
    lanes = sorted(draw(st.sets(st.integers(0, pair.experts), min_size=1)))
    kind = draw(st.sampled_from(("mixture", "product", "union")))
    weights = [draw(st.sampled_from((0.0, 1.0, 1.0, 3.0))) for _ in lanes]
    if kind != "product" and sum(weights):
        weights = [weight / sum(weights) for weight in weights]
    return Blend(
        kind,
        tuple(zip(lanes, weights, strict=True)),
        from_gate=kind == "mixture" and draw(st.booleans()),
        anchor=draw(st.integers(0, pair.experts)),
        plausibility=draw(st.sampled_from((0.0, 0.0, 0.1))) if kind == "product" else 0.0,
    )


@st.composite
def requests(draw: st.DrawFn, request_id: str, pair: Pair, *, focus: Focus = "all") -> GenerationRequest:
    """Where the focus is on deferral, deferred tokens are an expert's own, and all members read the prompt.

    Where it is on the veto, few expert tokens may be written, and what the base drafts past them hangs on it.
    """
    plain, vetoed = focus in ("deferral", "veto", "regret"), focus == "veto"
    regrets = (0.0, 0.3, 0.5, 0.7, 1.0) if focus == "regret" else (None, None, None, 1.0, 0.5)
    longest = pair.max_model_len
    length = draw(st.one_of(st.integers(1, 4), st.integers(1, longest - 1), st.integers(longest - 3, longest)))
    token = st.integers(0, pair.vocab_size - 1)
    prompt = st.lists(token, min_size=1, max_size=9)
    own = st.dictionaries(st.integers(1, pair.experts), prompt) if pair.experts else st.just({})
    experts = st.lists(st.integers(1, pair.experts), unique=True).map(tuple) if pair.experts else st.just(())
    return request(
        request_id,
        draw(st.lists(token, min_size=length, max_size=length)),
        client=draw(st.sampled_from("xyz")),
        max_tokens=draw(st.integers(1, 24)),
        min_tokens=draw(st.integers(0, 18)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(token, max_size=2))),
        seed=draw(st.integers(-(1 << 63), (1 << 64) - 1)),
        logprobs=draw(st.none() | st.integers(0, 2)),
        prompt_logprobs=draw(st.none() | st.integers(0, 2)),
        member=None if vetoed else draw(st.sampled_from((None, None, None, None, 0, 1, 2))),
        policy=draw(st.none() | st.sampled_from(POLICY_NAMES)),
        threshold=draw(st.none() | st.floats(0, 1)),
        rate=draw(st.floats(0, 1)),
        max_expert_tokens=draw(st.integers(1, 3) if vetoed else st.none() | st.integers(0, 5)),
        experts=draw(st.none() | experts),
        run_ahead=draw(st.sampled_from((2, 7) if vetoed else (None, "off", "auto", 1, 2, 7))),
        blend=None if plain else draw(st.none() | st.none() | blends(pair)),
        prompts=() if plain else tuple(draw(st.just({}) | st.just({}) | own).items()),
        scores=draw(st.sampled_from(SCORES[focus])),
        veto=draw(st.sampled_from((0.3, 0.7) if vetoed else (None, 0.0, 0.3, 0.7))),
        looks=draw(st.booleans()),
        regret=draw(st.sampled_from(regrets)),
    )

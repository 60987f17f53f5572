"""Blends over HTTP: what the engine is asked for, what clients are told, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from engine.blends import Blend
from engine.types import BLEND, Collaboration, Delta, GenerationRequest
from server.text.tokenizer import TextTokenizer
from tests.server.conftest import Build, House
from tests.server.fakes import MODEL, check_error, deltas_of, events, letters, settings

LANE = {"backend": "bench.standin", "vllm": {"vocab_size": 512, "max_model_len": 256}}
THREE: dict[str, Any] = {
    "experts": [{"name": "small", "model": "a", **LANE}, {"name": "plain", "model": "b", **LANE}],
    "blends": {
        "proxy": {"kind": "proxy", "tuned": "small", "untuned": "plain", "alpha": 0.5},
        "mine": {
            "kind": "mixture", "weights": {"base": 0.25, "small": 0.75}, "policy": "confidence", "threshold": 0.4,
            "served_model_name": "blended",
        },
    },
}  # fmt: skip
HALF = {"kind": "mixture", "weights": {"base": 0.5, "codes": 0.5}}


def blends(every: int = 2) -> Callable[[GenerationRequest], list[Delta]]:
    """A script: every other token of the alphabet is blended, by as many members as the request says."""

    def script(request: GenerationRequest) -> list[Delta]:
        tokens = letters("abcdefgh")[: request.sampling.max_tokens]
        blend = request.collaboration.blend
        assert blend is not None
        sources = [BLEND if index % every else 0 for index in range(len(tokens))]
        deltas = deltas_of(request, tokens, sources=sources, per_delta=3)
        for number, delta in enumerate(deltas):
            delta.support = [
                (index, [-float(lane) - 3 * number - index for lane in blend.effective().lanes])
                for index, source in enumerate(delta.sources)
                if source == BLEND
            ]
        return deltas

    return script


async def asked(house: House, **collaboration: Any) -> Collaboration:
    response = await house.complete(max_tokens=1, collaboration=collaboration)
    assert response.status_code == 200, response.text
    return house.engine.seen[-1].collaboration


async def test_an_object(house: House) -> None:
    found = await asked(house, policy="always", blend=HALF)
    assert found == Collaboration(policy="always", blend=Blend("mixture", ((0, 0.5), (1, 0.5))))
    product = {
        "kind": "product", "weights": {"codes": 1.5, "base": -0.5}, "anchor": "codes", "plausibility": 0.2,
    }  # fmt: skip
    assert (await asked(house, blend=product)).blend == Blend(
        "product", ((0, -0.5), (1, 1.5)), anchor=1, plausibility=0.2
    )
    assert (await asked(house, blend={"kind": "union", "top": 3})).blend == Blend("union", ((0, 0.5), (1, 0.5)), top=3)
    by_gate = (await asked(house, blend={"kind": "mixture", "weights": "gate"})).blend
    assert by_gate is not None
    assert (by_gate.from_gate, by_gate.lanes) == (True, (0, 1))


async def test_names(build: Build) -> None:
    house = await build(**THREE)
    third = pytest.approx(1 / 3)
    mixture = (await asked(house, blend="mixture")).blend
    assert mixture is not None
    assert mixture.weights == ((0, third), (1, third), (2, third))
    assert (await asked(house, blend="union", experts=["plain"])).blend == Blend("union", ((0, 0.5), (2, 0.5)))
    proxy = await asked(house, blend="proxy")
    assert proxy == Collaboration(policy="always", blend=Blend("product", ((0, 1.0), (1, 0.5), (2, -0.5))))
    assert (await asked(house, blend="proxy", alpha=2)).blend == Blend("product", ((0, 1.0), (1, 2.0), (2, -2.0)))
    contrast = await asked(house, blend="contrastive", experts=["small"], beta=1, policy="confidence")
    assert contrast.policy == "confidence"
    assert contrast.blend == Blend("product", ((0, -1.0), (1, 2.0)), anchor=1, plausibility=0.1)
    mine = await asked(house, blend="mine")
    assert mine == Collaboration(policy="confidence", threshold=0.4, blend=Blend("mixture", ((0, 0.25), (1, 0.75))))
    assert (await asked(house, blend="mine", policy="always")).threshold is None


async def test_a_model_of_its_own(build: Build) -> None:
    """Whose clients need no field of ours."""
    house = await build(**THREE)
    listed = {card["id"]: card["parent"] for card in (await house.http.get("/v1/models")).json()["data"]}
    assert listed["blended"] == MODEL
    response = await house.complete(model="blended", max_tokens=1)
    assert response.json()["model"] == "blended"
    expected = await asked(house, blend="mine")
    assert house.engine.seen[-2].collaboration == expected
    await house.complete(model="blended", max_tokens=1, collaboration={"blend": "union", "policy": "always"})
    assert house.engine.seen[-1].collaboration.blend is not None
    assert house.engine.seen[-1].collaboration.blend.kind == "union"
    assert await house.total("collm_tokens_total", model_name="blended", source="base") == 2


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_told(route: str, stream: bool, build: Build) -> None:
    house = await build(blends())
    body = {
        "model": MODEL, "max_tokens": 8, "stream": stream,
        "collaboration": {"blend": HALF, "report": True},
        **({"prompt": "x"} if route == "completions" else {"messages": [{"role": "user", "content": "x"}]}),
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }  # fmt: skip
    response = await house.http.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    chunks = events(response.text)[:-1] if stream else [response.json()]
    reports = [choice["collaboration"] for chunk in chunks for choice in chunk["choices"]]
    assert all(len(report["support"]) == len(report["sources"]) for report in reports)
    sources = [source for report in reports for source in report["sources"]]
    support = [item for report in reports for item in report["support"]]
    assert sources == ["base", "blend"] * 4
    assert support == [
        {"base": -float(index), "codes": -1.0 - index} if index % 2 else None for index in range(8)
    ]  # fmt: skip
    details = chunks[-1]["usage"]["completion_tokens_details"]
    assert details == {"base_tokens": 4, "expert_tokens": 0, "blended_tokens": 4}
    assert await house.total("collm_tokens_total", model_name=MODEL, source="blend") == 4
    assert await house.total("collm_tokens_total", model_name=MODEL, source="codes") == 0


async def test_support_of_text_that_is_held_back(build: Build) -> None:
    """A stop string, and a piece that is split, keep support beside its token."""
    house = await build(blends())
    response = await house.complete(
        max_tokens=8, stop=["fg"], stream=True, collaboration={"blend": HALF, "report": True}
    )
    reports = [choice["collaboration"] for chunk in events(response.text)[:-1] for choice in chunk["choices"]]
    told = [item for report in reports for item in report["support"]]
    assert [item and item["base"] for item in told] == [None, -1, None, -3, None, -5, None]


async def test_no_support_where_nothing_is_blended(house: House) -> None:
    response = await house.complete(collaboration={"report": True})
    assert "support" not in response.json()["choices"][0]["collaboration"]
    assert "blended_tokens" not in response.json()["usage"]["completion_tokens_details"]


async def test_guidance(build: Build, tokenizer: TextTokenizer) -> None:
    """Two rows of the base, the second one under the negative prompt."""
    house = await build(blends(), scheduler={"guidance": True})
    response = await house.complete(
        max_tokens=2, collaboration={"blend": "cfg", "gamma": 2, "negative_prompt": "bad", "report": True}
    )
    assert response.status_code == 200, response.text
    seen = house.engine.seen[-1].collaboration
    assert seen.policy == "always"
    assert seen.blend == Blend("product", ((0, 2.0), (2, -1.0)))
    assert seen.prompts == ((2, await tokenizer.encode("bad", add_special_tokens=True)),)
    assert response.json()["choices"][0]["collaboration"]["support"] == [None, {"base": -1.0, "negative": -3.0}]
    error = check_error(await house.complete(collaboration={"blend": "cfg"}), 400, "collaboration.negative_prompt")
    assert "required" in error["message"]
    seen = await asked(house, blend="cfg", gamma=1)
    assert (seen.prompts, seen.blend) == ((), Blend("product", ((0, 1.0), (2, 0.0))))


async def test_a_prompt_per_member(build: Build, tokenizer: TextTokenizer) -> None:
    house = await build(**THREE)
    seen = await asked(house, blend="proxy", prompts={"small": "a chat", "plain": "a text"})
    assert dict(seen.prompts) == {
        1: await tokenizer.encode("a chat", add_special_tokens=True),
        2: await tokenizer.encode("a text", add_special_tokens=True),
    }
    response = await house.chat(max_tokens=1, collaboration={"prompts": {"small": "a chat"}})
    assert response.status_code == 200
    assert house.engine.seen[-1].collaboration.prompts == (
        (1, await tokenizer.encode("a chat", add_special_tokens=False)),
    )


B = "collaboration.blend"


@pytest.mark.parametrize(
    ("collaboration", "param", "says"),
    [
        ({"blend": "nothing"}, B, "contrastive, mixture"),
        ({"blend": ""}, B, ""),
        ({"blend": 3}, B, "name of a blend"),
        ({"blend": {}}, f"{B}.kind", ""),
        ({"blend": {"kind": "sum"}}, f"{B}.kind", ""),
        ({"blend": {"kind": "mixture", "weight": {}}}, f"{B}.weight", ""),
        ({"blend": {"kind": "mixture", "weights": {"base": 0.5, "who": 0.5}}}, B, "no member"),
        ({"blend": {"kind": "mixture", "weights": {"base": 0.5, "codes": 0.6}}}, B, "sum to 1"),
        ({"blend": {"kind": "mixture", "weights": "equal"}}, f"{B}.weights", "gate"),
        ({"blend": {"kind": "mixture", "weights": {"base": 11}}}, f"{B}.weights", ""),
        ({"blend": {"kind": "mixture", "top": 3}}, B, "top is not for a mixture"),
        ({"blend": {"kind": "product"}}, B, "needs weights"),
        ({"blend": {"kind": "product", "weights": "gate"}}, B, "needs weights"),
        ({"blend": {"kind": "product", "weights": {"base": 2}}}, B, "no expert"),
        ({"blend": {"kind": "product", "weights": {"codes": 1}, "plausibility": 0.1}}, B, "needs an anchor"),
        ({"blend": {"kind": "product", "weights": {"codes": 1}, "anchor": "codes"}}, B, "needs plausibility"),
        ({"blend": {"kind": "product", "weights": {"codes": 1}, "plausibility": 0}}, f"{B}.plausibility", ""),
        ({"blend": {"kind": "union", "top": 0}}, f"{B}.top", ""),
        ({"blend": "proxy"}, B, "name it in the configuration"),
        ({"blend": "mixture", "alpha": 1}, "collaboration.alpha", "'proxy' and 'contrastive'"),
        ({"alpha": 1}, "collaboration.alpha", ""),
        ({"blend": "contrastive", "alpha": 2}, B, "plausibility"),
        ({"blend": HALF, "beta": 1}, "collaboration.beta", "'contrastive'"),
        ({"blend": HALF, "experts": []}, B, "not among the experts"),
        ({"blend": "cfg", "negative_prompt": "x"}, B, "scheduler.guidance"),
        ({"negative_prompt": "x"}, "collaboration.negative_prompt", "'cfg'"),
        ({"prompts": {"base": "x"}}, "collaboration.prompts", "no expert"),
        ({"policy": "never", "blend": HALF}, B, "asks no expert"),
        ({"prompts": {"who": "x"}}, "collaboration.prompts", "no expert"),
        ({"prompts": {"codes": ""}}, "collaboration.prompts", ""),
        ({"prompts": {"codes": "x" * 100000}}, "collaboration.prompts", "maximum context"),
    ],
)
async def test_refused(collaboration: dict[str, Any], param: str, says: str, house: House) -> None:
    error = check_error(await house.complete(collaboration=collaboration), 400)
    assert error["param"].startswith(param), error
    assert says in error["message"]
    assert not house.engine.seen


async def test_refused_for_what_is_served(build: Build, house: House) -> None:
    error = check_error(await house.complete(model=f"{MODEL}/codes", collaboration={"blend": HALF}), 400, B)
    assert "joint model" in error["message"]
    house = await build(gate=False)
    weights = {"kind": "mixture", "weights": "gate"}
    error = check_error(await house.complete(collaboration={"policy": "always", "blend": weights}), 400, B)
    assert "gate" in error["message"]
    error = check_error(await house.complete(collaboration={"blend": "nothing"}), 400, B)
    assert "mixture" in error["message"]
    assert "cfg" not in error["message"], "what this pair cannot have"
    house = await build(experts=[{"name": "codes", "model": "expert", "executor": "ray", **LANE}])
    error = check_error(await house.complete(collaboration={"blend": HALF}), 400, B)
    assert "another machine" in error["message"]


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ({"kind": "mixture", "weights": {"base": 0.5, "nobody": 0.5}}, "no member"),
        ({"kind": "mixture", "alpha": 1}, "alpha is not for kind 'mixture'"),
        ({"kind": "proxy"}, "'tuned'"),
        ({"kind": "mixture", "served_model_name": MODEL}, "taken"),
        ({"kind": "mixture", "served_model_name": f"{MODEL}/base"}, "taken"),
        ({"kind": "sum"}, "kind"),
    ],
)
def test_a_configuration_that_cannot_be_served(preset: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(blends={"bad": preset})


def test_presets_of_a_served_pair_survive_the_wire() -> None:
    collaboration = Collaboration(blend=Blend("product", ((0, 1.0), (1, -1.0)), plausibility=0.5))
    sent = msgspec.msgpack.encode(collaboration)
    assert msgspec.msgpack.decode(sent, type=Collaboration) == collaboration

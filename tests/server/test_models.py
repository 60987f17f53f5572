from __future__ import annotations

import openai
import pytest

from engine.types import Collaboration
from server.models import ModelTable
from tests.server.conftest import Build, House
from tests.server.fakes import FakeEngine, check_error, letters, writes

NAMES = ["collm-demo", "collm-demo/base", "collm-demo/codes"]


async def test_the_list(house: House) -> None:
    body = (await house.http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == NAMES
    assert {card["object"] for card in body["data"]} == {"model"}
    assert {card["max_model_len"] for card in body["data"]} == {256}


@pytest.mark.parametrize("name", NAMES)
async def test_one_model(house: House, name: str) -> None:
    card = (await house.http.get(f"/v1/models/{name}")).json()
    assert card["id"] == name
    assert isinstance(card["created"], int)
    assert card["parent"] == (None if name == "collm-demo" else "collm-demo")


async def test_an_encoded_slash_is_a_slash(house: House) -> None:
    client = openai.AsyncOpenAI(base_url="http://house/v1", api_key="none", http_client=house.http)
    assert (await client.models.retrieve("collm-demo/codes")).id == "collm-demo/codes"
    assert [model.id async for model in client.models.list()] == NAMES


async def test_unknown_models(house: House) -> None:
    for name in ("nope", "collm-demo/nobody", "collm-demo/codes/x"):
        assert check_error(await house.http.get(f"/v1/models/{name}"), 404, "model")["code"] == "model_not_found"


async def test_a_base_alone_is_served_under_both_names(build: Build) -> None:
    house = await build(writes(letters("ab"), sources=[0, 0]), experts=[], served_model_name="org/model", gate=False)
    body = (await house.http.get("/v1/models")).json()
    assert [card["id"] for card in body["data"]] == ["org/model", "org/model/base"]
    assert (await house.complete(model="org/model")).status_code == 200


async def test_the_joint_model_says_how_its_members_work_together(build: Build) -> None:
    house = await build(example_prompt="Who?")
    joint, *members = (await house.http.get("/v1/models")).json()["data"]
    assert joint["collaboration"] == {
        "policy": "threshold",
        "policies": ["threshold", "sample", "always", "never", "random", "confidence"],
        "thresholds": {"threshold": 0.5, "confidence": 0.5},
        "gate": True,
        "experts": ["codes"],
        "blends": ["mixture", "union", "contrastive"],
        "strategies": ["deferral"],
        "vocabularies": "same",
    }
    assert (joint["chat"], joint["example_prompt"]) == (True, "Who?")
    assert all("collaboration" not in card for card in members)


async def test_a_pair_without_a_gate_is_served_by_the_base_s_confidence(build: Build) -> None:
    house = await build(writes(letters("ab")), gate=False)
    joint = (await house.http.get("/v1/models/collm-demo")).json()["collaboration"]
    assert (joint["policy"], joint["thresholds"], joint["gate"]) == ("confidence", {"confidence": 0.5}, False)
    assert "threshold" not in joint["policies"]
    assert (await house.complete()).status_code == 200
    assert house.engine.seen[-1].collaboration.policy is None, "the engine knows its default"
    refused = await house.complete(collaboration={"policy": "threshold"})
    assert "needs a gate" in check_error(refused, 400, "collaboration.policy")["message"]


def test_the_configured_policy_of_a_pair_without_a_gate_comes_first() -> None:
    table = ModelTable("pair", ("base", "codes"))
    info = FakeEngine(writes([]), gate=False, policy="never").info
    assert table.served(info).policy == "never"
    assert table.collaboration("pair", None, info) == Collaboration()

"""How sure the models were, which tokens deserve a second look, and experts that stand back."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from engine.second_look import deserves_check
from engine.types import BASE, BLEND, Delta, GenerationRequest, Look
from tests.server.conftest import Build, House
from tests.server.fakes import check_error, deltas_of, events, letters

LOOKS = [
    Look(0.9), Look(0.75, 0.95, agreed=True), Look(0.5), Look(0.99, 0.25, agreed=False),
    Look(0.875, 0.125, agreed=True),
]  # fmt: skip
SOURCES = [0, 1, 0, 1, 0]
VETOED = [4]
LISTS = ("tokens", "sources", "base_confidences", "expert_confidences", "agreed", "check", "vetoed")


def script(request: GenerationRequest) -> list[Delta]:
    count = request.sampling.max_tokens
    deltas = deltas_of(request, letters("abcde")[:count], sources=SOURCES[:count])
    for number, delta in enumerate(deltas):
        if request.collaboration.looks:
            delta.looks = [LOOKS[number]]
        delta.vetoed = [0] if number in VETOED else []
    return deltas


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_told(route: str, stream: bool, build: Build) -> None:
    house = await build(script)
    body = {
        "model": "collm-demo", "max_tokens": 5, "stream": stream, "collaboration": {"veto": 0.25, "report": True},
        **({"prompt": "x"} if route == "completions" else {"messages": [{"role": "user", "content": "x"}]}),
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }  # fmt: skip
    response = await house.http.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    asked = house.engine.seen[0].collaboration
    assert (asked.veto, asked.looks) == (0.25, True)
    chunks = events(response.text)[:-1] if stream else [response.json()]
    reports = [choice["collaboration"] for chunk in chunks for choice in chunk["choices"]]
    for report in reports:
        # Nobody stood back in most chunks.
        assert all(len(report[name]) == len(report["tokens"]) for name in LISTS if name in report or name != "vetoed")
    whole = {name: [item for report in reports for item in report.get(name, [])] for name in LISTS}
    assert whole["base_confidences"] == [0.9, 0.75, 0.5, 0.99, 0.875]
    assert whole["expert_confidences"] == [None, 0.95, None, 0.25, 0.125]
    assert whole["agreed"] == [None, True, None, False, True]
    assert whole["check"] == [False, False, True, True, True]
    assert whole["vetoed"] == ([True] if stream else [False, False, False, False, True])
    details = chunks[-1]["usage"]["completion_tokens_details"]
    assert details == {"base_tokens": 3, "expert_tokens": 2, "vetoed_tokens": 1}


async def test_nothing_is_read_for_nobody(build: Build) -> None:
    house = await build(script)
    response = await house.complete(max_tokens=3)
    assert not house.engine.seen[0].collaboration.looks
    assert "vetoed_tokens" not in response.json()["usage"]["completion_tokens_details"]


async def test_a_token_that_is_held_back_keeps_its_numbers(build: Build) -> None:
    """Of "cde" nothing is released before it is clear that it is not "cdx"; then the stop string takes its end away."""
    house = await build(script)
    for stop, kept in (("cdx", 5), ("de", 4)):
        response = await house.complete(stream=True, stop=[stop], collaboration={"report": True})
        reports = [choice["collaboration"] for chunk in events(response.text)[:-1] for choice in chunk["choices"]]
        sure = [value for report in reports for value in report["base_confidences"]]
        assert sure == [0.9, 0.75, 0.5, 0.99, 0.875][: kept + (stop == "de")]
        assert all(len(report["check"]) == len(report["tokens"]) for report in reports)


async def test_how_unsure_is_the_server_s_to_say(build: Build) -> None:
    house = await build(script, server={"check_below": 0.3})
    response = await house.complete(max_tokens=4, collaboration={"report": True})
    assert response.json()["choices"][0]["collaboration"]["check"] == [False, False, False, True]


async def test_a_member_alone_tells_too(build: Build) -> None:
    house = await build(script)
    await house.complete(model="collm-demo/codes", collaboration={"report": True})
    assert house.engine.seen[0].collaboration.looks
    check_error(await house.complete(model="collm-demo/codes", collaboration={"veto": 0.5}), 400, "collaboration.veto")


@pytest.mark.parametrize(
    ("collaboration", "says"),
    [
        ({"veto": 1.5}, "must be at most 1"),
        ({"veto": -0.1}, "must be at least 0"),
        ({"veto": "high"}, "must be a number"),
        ({"veto": 0.5, "blend": "mixture"}, "in a blend the members write together"),
    ],
)
async def test_what_is_refused(house: House, collaboration: dict[str, Any], says: str) -> None:
    error = check_error(await house.complete(collaboration=collaboration), 400, "collaboration.veto")
    assert says in error["message"]


async def test_a_blend_of_the_configuration_s_may_be_asked_for_without_a_veto(house: House) -> None:
    response = await house.complete(max_tokens=1, collaboration={"veto": 0, "blend": "mixture"})
    assert response.status_code == 200, response.text


async def test_models_tell_the_default(house: House) -> None:
    assert "veto" not in (await house.http.get("/v1/models")).json()["data"][0]["collaboration"]
    house.engine.info = msgspec.structs.replace(house.engine.info, veto=0.3)
    assert (await house.http.get("/v1/models")).json()["data"][0]["collaboration"]["veto"] == 0.3


@pytest.mark.parametrize(
    ("source", "look", "support", "checked"),
    [
        (BASE, Look(0.8), None, False),
        (BASE, Look(0.6), None, True),
        # Whoever wrote it counts.
        (BASE, Look(0.8, 0.1, agreed=False), None, False),
        (1, Look(0.1, 0.8, agreed=False), None, False),
        (1, Look(0.9, 0.6, agreed=False), None, True),
        # Of what several wrote the surest of them.
        (BLEND, Look(0.1, None, agreed=False), [math.log(0.1), math.log(0.8)], False),
        (BLEND, Look(0.9, None, agreed=False), [math.log(0.6), math.nan], True),
        # Nothing is known.
        (1, Look(), None, False),
        (BLEND, Look(), None, False),
    ],
)
def test_what_deserves_a_second_look(source: int, look: Look, support: list[float] | None, checked: bool) -> None:
    assert deserves_check(source, look, support, below=0.7) == checked
    assert deserves_check(source, look, support, doubted=True, below=0.0)

"""What a response says it took: usage of each member, cached prompt tokens, the time in the queue, Server-Timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.types import Cost, Delta, GenerationRequest
from tests.server.conftest import Build
from tests.server.fakes import deltas_of, letters
from tests.server.test_streaming import events

LAST = Cost(0.25, 8, [12, 40], [0.5, 2.0])


def costs(*found: Cost) -> Callable[[GenerationRequest], list[Delta]]:
    """A script that writes abcd; choice i has cost ``found[i]`` in the end, and half of it with its first token."""

    def script(request: GenerationRequest) -> list[Delta]:
        whole = found[int(request.request_id.rpartition("-")[2])]
        deltas = deltas_of(request, letters("abcd"))
        half = [seconds / 2 for seconds in whole.seconds]
        deltas[0].cost = Cost(whole.queue_seconds, whole.cached_tokens, whole.prompt_tokens, half)
        deltas[-1].cost = whole
        return deltas

    return script


async def test_usage_by_member(build: Build) -> None:
    house = await build(costs(LAST))
    usage = (await house.complete(max_tokens=4)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 8}
    assert usage["collaboration"] == {
        "by_source": {
            "base": {"tokens": 2, "prompt_tokens": 12, "seconds": 0.5},
            "codes": {"tokens": 2, "prompt_tokens": 40, "seconds": 2.0},
        },
        "queue_seconds": 0.25,
    }


async def test_a_member_alone_has_its_own_line_only(build: Build) -> None:
    house = await build(costs(Cost(0.0, 3, [0, 9], [0.0, 1.5])))
    usage = (await house.complete(model="collm-demo/codes", max_tokens=4)).json()["usage"]
    assert usage["collaboration"]["by_source"] == {"codes": {"tokens": 4, "prompt_tokens": 9, "seconds": 1.5}}
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_choices_add_up_and_each_prompt_s_cache_counts_once(build: Build) -> None:
    """Of two choices the second found what the first had computed; the work was done all the same."""
    house = await build(costs(Cost(0.1, 0, [12, 0], [1.0, 0.0]), Cost(0.4, 8, [4, 0], [0.5, 0.0])))
    usage = (await house.chat(max_tokens=4, n=2)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["collaboration"]["by_source"]["base"] == {"tokens": 4, "prompt_tokens": 16, "seconds": 1.5}
    assert usage["collaboration"]["queue_seconds"] == 0.4


async def test_negative_prompts_are_the_base_s_work(build: Build) -> None:
    house = await build(costs(Cost(0.0, 0, [12, 0, 7], [1.0, 0.0, 0.5])))
    by_source = (await house.complete(max_tokens=4)).json()["usage"]["collaboration"]["by_source"]
    assert by_source["base"] == {"tokens": 2, "prompt_tokens": 19, "seconds": 1.5}


@pytest.mark.parametrize("path", ["complete", "chat"])
async def test_a_stream_s_usage_chunk_has_it_all(build: Build, path: str) -> None:
    house = await build(costs(LAST))
    ask: Any = getattr(house, path)
    whole = (await ask(max_tokens=4)).json()["usage"]
    response = await ask(max_tokens=4, stream=True, stream_options={"include_usage": True})
    *_, usage, done = events(response.text)
    assert done == "[DONE]"
    assert usage["usage"] == whole
    assert whole["collaboration"]["by_source"]["codes"]["seconds"] == 2.0


async def test_a_stop_string_costs_what_was_told_last(build: Build) -> None:
    house = await build(costs(LAST))
    usage = (await house.complete(max_tokens=4, stop="b")).json()["usage"]
    assert usage["collaboration"]["by_source"]["codes"]["seconds"] == 1.0


def timings(header: str) -> dict[str, float]:
    """Milliseconds by name, of a Server-Timing header."""
    return {name: float(value) for name, _, value in (part.partition(";dur=") for part in header.split(", "))}


async def test_server_timing(build: Build) -> None:
    house = await build(costs(LAST))
    found = timings((await house.complete(max_tokens=4)).headers["server-timing"])
    assert list(found) == ["queue", "lane-base", "lane-codes", "total"]
    assert (found["queue"], found["lane-base"], found["lane-codes"]) == (250.0, 500.0, 2000.0)
    assert 0 < found["total"] < 60_000


async def test_a_stream_s_header_is_of_its_first_token(build: Build) -> None:
    house = await build(costs(LAST))
    response = await house.chat(max_tokens=4, stream=True)
    assert timings(response.headers["server-timing"])["lane-codes"] == 1000.0


async def test_refusals_have_no_timing(build: Build) -> None:
    house = await build(costs(LAST))
    assert "server-timing" not in (await house.complete(temperature=9)).headers

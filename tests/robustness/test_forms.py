"""One client asks for what takes long to read or to follow: what another one sees of it meanwhile, and afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from tests.robustness import raw
from tests.robustness.conftest import OTHER_KEY
from tests.robustness.servers import MODEL, PROMPTS, FaultServer
from tests.waiting import eventually

BOUND_SECONDS = 8.0
"""Longest that the other client may wait, or twenty times as long as alone. Unbounded, each of these took from 14
seconds to some minutes.
"""
BOOLEAN = {"type": "json_schema", "json_schema": {"name": "truth", "schema": {"type": "boolean"}}}


def _many_properties(number: int) -> dict[str, Any]:
    properties = {f"p{number}{each}": {} for each in range(2000)}
    return {"structured_outputs": {"json": {"type": "object", "properties": properties, "minProperties": 1}}}


def _exponential(number: int) -> dict[str, Any]:
    pattern = f"^(([a-z]{{0,14}}x?){{0,14}}y?){{0,{14 + number}}}$"
    return {"structured_outputs": {"json": {"type": "string", "pattern": pattern}}}


def _many_alternatives(number: int) -> dict[str, Any]:
    """Takes the readers some seconds: every two of its alternatives are compared."""
    rules = " | ".join(f'"{number:x}{each:x}" root' for each in range(3500))
    return {"structured_outputs": {"grammar": f'root ::= {rules} | "x"'}}


def _costly_masks(number: int) -> dict[str, Any]:
    grammar = f'root ::= (("a"? "b"?){{1,100}}){{1,{100 - number}}}'
    return {"structured_outputs": {"grammar": grammar}, "max_tokens": 200, "n": 4}


def _many_stops(number: int) -> dict[str, Any]:
    # Within the limits: as many as a list may have, for as many choices as there may be.
    stops = [(7 * each + number) % 1000 + 1 for each in range(4096)]
    return {"stop_token_ids": stops, "n": 16, "prompt": PROMPTS[:2], "min_tokens": 60, "max_tokens": 60}


def _wait_of(server: FaultServer) -> float:
    """Seconds that free text, and an answer with a form, take together."""
    begin = time.monotonic()
    assert server.text(PROMPTS[1], max_tokens=8)
    assert server.text(PROMPTS[1], max_tokens=8, response_format=BOOLEAN).strip() in ("true", "false")
    return time.monotonic() - begin


@pytest.mark.parametrize(
    "asks",
    [_many_properties, _exponential, _many_alternatives, _costly_masks, _many_stops],
    ids=lambda asks: asks.__name__,
)
def test_another_client_does_not_wait(live: FaultServer, asks: Callable[[int], dict[str, Any]]) -> None:
    other = FaultServer(live.process, live.url, live.log, OTHER_KEY)
    _wait_of(other)  # everything has started
    bound = max(BOUND_SECONDS, 20 * _wait_of(other))
    body = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 8}
    # Read where steps run, this many would keep everybody waiting for longer than the bound.
    socks = [raw.connect(live) for _ in range(32 if asks is _many_alternatives else 4)]
    for number, sock in enumerate(socks):
        sock.sendall(raw.post(live, json.dumps({**body, **asks(number)}).encode()))
    assert _wait_of(other) < bound
    for sock in socks:
        sock.close()
    assert _wait_of(other) < bound
    eventually(live.is_empty)
    eventually(lambda: _readers_are_idle(live))
    live.check_good()


def _readers_are_idle(server: FaultServer) -> bool:
    """No reader of forms uses the processor."""
    with suppress(psutil.NoSuchProcess):  # one may end in between
        readers = [
            child
            for child in server.engine().children()
            if child.status() != psutil.STATUS_ZOMBIE and "engine.grammar.worker" in child.cmdline()
        ]
        before = [sum(reader.cpu_times()[:2]) for reader in readers]
        time.sleep(0.3)
        now = [sum(reader.cpu_times()[:2]) for reader in readers]
        return bool(readers) and all(after - earlier < 0.1 for after, earlier in zip(now, before, strict=True))
    return False

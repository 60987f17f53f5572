"""Hypothesis on the wire between our processes: bytes that are nearly a message are either that message's type or an
error of the decoder; nothing else can come of them. (Round trips, cuts and plain garbage: tests/engine/test_messages.)
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.messages import Abort, Batch, Dead, FromEngine, Progress, Ready, Shutdown, Start, Submit, ToEngine
from engine.stats import EngineStats, LaneStats
from engine.types import Delta, GenerationRequest, TokenLogprobs

MESSAGES: list[Any] = [
    Start('{"base": {}}'),
    Submit([GenerationRequest("a", [1, 2, 3])]),
    Abort(["a", "b"]),
    Shutdown(),
    Progress("loading"),
    Batch(
        [Delta("a", [1], [0], [0.5], [TokenLogprobs([1], [-0.5], 1)], finish_reason="stop")],
        EngineStats([LaneStats("base", step_seconds=[0.1])], 1, 2),
    ),
    Dead("a lane failed"),
]
NAMES = {type(message) for message in MESSAGES}
plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(),
        st.text(max_size=10), st.binary(max_size=9),
    ),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


def _decode(direction: Any, data: bytes) -> Any:
    """The message, or None if the decoder refuses in one of the ways that it has."""
    try:
        return msgspec.msgpack.Decoder(direction).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@given(data=st.data())
def test_changed_bytes(message: Any, data: st.DataObject) -> None:
    encoded = bytearray(msgspec.msgpack.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    for direction in (ToEngine, FromEngine):
        decoded = _decode(direction, bytes(encoded))
        assert decoded is None or type(decoded) in NAMES | {Ready}
        if isinstance(decoded, Batch):
            assert all(isinstance(token, int) for delta in decoded.deltas for token in delta.tokens)


@given(value=plain)
@example(value={"type": "Submit", "requests": []})
@example(value=[])
def test_any_value(value: Any) -> None:
    for direction in (ToEngine, FromEngine):
        decoded = _decode(direction, msgspec.msgpack.encode(value))
        assert decoded is None or type(decoded) in NAMES


@settings(deadline=None)
@given(depth=st.integers(1, 100_000))
@example(depth=100_000)
def test_deep_nesting(depth: int) -> None:
    """Arrays within arrays end in an error, not in an overflown stack."""
    assert _decode(ToEngine, b"\x91" * depth + b"\x90") is None
    assert _decode(FromEngine, b"\x82\xa4type\xa5Batch\xa6deltas" + b"\x91" * depth + b"\x90") is None
    unknown = _decode(ToEngine, b"\x82\xa4type\xa8Shutdown\xa1x" + b"\x91" * depth + b"\x90")
    assert unknown is None or unknown == Shutdown()


def test_lengths_that_lie() -> None:
    """A header that announces four billion entries allocates none of them."""
    for header in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"):
        assert _decode(ToEngine, header) is None
        assert _decode(ToEngine, b"\x82\xa4type\xa5Abort\xabrequest_ids" + header) is None

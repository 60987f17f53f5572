"""Every message survives the wire as it is, and garbage is refused as garbage."""

from __future__ import annotations

import types
import typing
from enum import Enum
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import FromEngine, ToEngine

MESSAGES = [*typing.get_args(ToEngine), *typing.get_args(FromEngine)]
PLAIN = {
    int: st.integers(-(1 << 63), (1 << 64) - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bool: st.booleans(),
    bytes: st.binary(max_size=5),
    type(None): st.none(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type as it stands in a struct."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, args))
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is tuple:
        if args[1] is not Ellipsis:
            return st.tuples(*map(values, args))
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    if issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})
    return PLAIN[kind]


def decoder_of(message: type[msgspec.Struct]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(ToEngine if message in typing.get_args(ToEngine) else FromEngine)


@pytest.mark.parametrize("message", MESSAGES)
@given(data=st.data())
def test_round_trip(message: type[msgspec.Struct], data: st.DataObject) -> None:
    sent = data.draw(values(message))
    received = decoder_of(message).decode(msgspec.msgpack.encode(sent))
    assert type(received) is message
    assert received == sent


@pytest.mark.parametrize("direction", [ToEngine, FromEngine])
@given(garbage=st.binary(max_size=200))
def test_garbage(direction: Any, garbage: bytes) -> None:
    """A text that is not UTF-8 is the one thing that msgspec reports otherwise."""
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        msgspec.msgpack.Decoder(direction).decode(garbage)


@pytest.mark.parametrize("message", MESSAGES)
@given(data=st.data())
def test_every_cut_is_noticed(message: type[msgspec.Struct], data: st.DataObject) -> None:
    encoded = msgspec.msgpack.encode(data.draw(values(message)))
    length = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(msgspec.DecodeError):
        decoder_of(message).decode(encoded[:length])


@pytest.mark.parametrize("message", MESSAGES)
def test_no_direction_takes_the_others_messages(message: type[msgspec.Struct]) -> None:
    other = FromEngine if message in typing.get_args(ToEngine) else ToEngine
    with pytest.raises(msgspec.ValidationError, match="Invalid value"):
        msgspec.msgpack.Decoder(other).decode(msgspec.msgpack.encode({"type": message.__name__}))


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "Abort", "request_ids": "0"},
        {"type": "Submit", "requests": [{"request_id": "0", "prompt": ["a"]}]},
        {"type": "Submit", "requests": [{"request_id": "0"}]},
        {"type": "Submit", "requests": [{"request_id": "0", "prompt": [1], "collaboration": {"policy": "maybe"}}]},
        {"type": "Start"},
        {},
        None,
    ],
)
def test_wrong_fields_are_refused(fields: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.Decoder(ToEngine).decode(msgspec.msgpack.encode(fields))

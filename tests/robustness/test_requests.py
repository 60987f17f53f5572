"""Hypothesis on request bodies: whatever bytes come, the answer is a status of the contract and an error object, and
nothing that was sent is echoed at length. Seeds that found something stay here as examples.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server.errors import ApiError, from_validation
from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest

BODIES = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
FIELDS = sorted({name for body in BODIES for name in body.model_fields} | {"nonsense", "\x00", "ünï", ""})
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(
        [0, 1, -1, 2**31, 2**63, 1e308, "collm-demo", "always", [[1]], [{"role": "user", "content": "x"}]]
    )
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
objects = st.dictionaries(st.sampled_from(FIELDS), values, max_size=6)
nearly_good = objects.map(lambda fields: {"model": "m", "prompt": "p", "messages": None, **fields})
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _parse(model: Any, body: bytes) -> ApiError | None:
    """What the routes do with a body, without HTTP."""
    try:
        model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        return from_validation(problems, model.messages_by_field)
    return None


def _check(error: ApiError | None) -> None:
    if error is None:
        return
    assert error.status == 400
    body = json.loads(error.body())["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert 0 < len(body["message"]) < 600
    assert "pydantic" not in body["message"]
    assert body["param"] is None or len(body["param"]) < 200


@COMMON
@given(body=st.binary(max_size=300), model=st.sampled_from(BODIES))
@example(body=b'{"model": "\xff"}', model=CompletionRequest)
@example(body=b'"\\ud800"', model=CompletionRequest)
@example(body=b'{"stop": "\\udc00"}', model=ChatRequest)
@example(body=b"[" * 5000, model=TokenizeRequest)
@example(body=b'{"seed": ' + b"9" * 5000 + b"}", model=CompletionRequest)
def test_any_bytes(body: bytes, model: Any) -> None:
    _check(_parse(model, body))


@COMMON
@given(fields=objects | nearly_good, model=st.sampled_from(BODIES))
def test_any_json(fields: dict[str, Any], model: Any) -> None:
    _check(_parse(model, json.dumps(fields).encode("utf-8", "surrogatepass")))


@COMMON
@given(name=st.text(min_size=1, max_size=3000), value=values)
def test_made_up_fields_are_refused_and_cut(name: str, value: Any) -> None:
    body = {"model": "m", "prompt": "p", name: value}
    if name not in CompletionRequest.model_fields:
        error = _parse(CompletionRequest, json.dumps(body).encode("utf-8", "surrogatepass"))
        assert error is not None
        _check(error)

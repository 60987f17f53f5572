"""What can go wrong, as clients see it: one shape for every error on every route.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

All four keys are always there; ``param`` names the field at fault, ``code`` is a stable word to branch on, and both
may be null. What a client sent is never echoed at length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.errors import CollmError, EngineDeadError, RequestError
from engine.types import ErrorCode

UNSUPPORTED_VALUE = "unsupported_value"
"""Pydantic's type of error for a value that :class:`server.protocol.base.Only` refuses."""


class ErrorBody(msgspec.Struct):
    """The inside of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct):
    """Body of every response with a status from 400 on, and of an error event in a stream."""

    error: ErrorBody


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: one sentence for the client's developer.
        param: the field at fault, e.g. ``collaboration.threshold``.
        code: stable word.
        type_: OpenAI's class of error; by default what the status says.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type_: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type_ or _type_of(status)
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode(ErrorResponse(ErrorBody(self.message, self.type, self.param, self.code)))


class FieldError(ValueError):
    """Raised by a request model's own validators: fields that don't go together, with the one at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served as it stands."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str) -> ApiError:
    """404: no such model."""
    return ApiError(404, f"The model {shown(name)} does not exist.", param="model", code="model_not_found")


def not_ready(message: str, retry_after: int) -> ApiError:
    """503: not now."""
    return ApiError(503, message, code="not_ready", headers={"Retry-After": str(retry_after)})


def overloaded(message: str, retry_after: int) -> ApiError:
    """429: too much at once."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(retry_after)})


def engine_failure(error: CollmError) -> ApiError:
    """What an error of the engine looks like from outside."""
    if isinstance(error, EngineDeadError):
        return ApiError(500, "The engine died while it served this request.", code="engine_dead")
    if isinstance(error, RequestError):
        return request_failure(str(error))
    return ApiError(500, "Internal error.", code="internal_error")


def request_failure(message: str | None, cause: ErrorCode | None = None) -> ApiError:
    """A request that the engine ended with an error; its messages are safe to show."""
    text = message or "The request failed."
    if cause is ErrorCode.STEP_TIMEOUT:
        return ApiError(504, text, code="step_timeout")
    return ApiError(500, text, code="request_failed")


def from_status(status: int, headers: Mapping[str, str] | None = None) -> ApiError:
    """An error that the framework raised: an unknown path, a wrong method."""
    message, code = {
        404: ("There is nothing at this path.", "not_found"),
        405: ("This path does not have that method.", "method_not_allowed"),
    }.get(status, ("The request cannot be served.", None))
    return ApiError(status, message, code=code, headers=headers)


def shown(value: object, limit: int = 64) -> str:
    """A client's value, quoted for a message: cut, printable, on one line."""
    text = value if isinstance(value, str) else repr(value)
    cut = text[:limit]
    safe = "".join(char if char.isprintable() else "?" for char in cut)
    return f"'{safe}{'...' if len(text) > limit else ''}'"


VARIANTS = ("(name)", "(object)")
"""How a field's shapes are told apart where it may have several; no part of its path."""


def from_validation(problems: list[Any], messages: Mapping[str, str]) -> ApiError:
    """The first problem that pydantic found, in the client's words.

    Args:
        problems: ``ValidationError.errors(include_input=False, include_url=False)``.
        messages: by field, or by object and field, what to say where several shapes are allowed and none fitted.
    """
    problem = problems[0]
    kind, location = problem["type"], tuple(part for part in problem["loc"] if part not in VARIANTS)
    if kind == "json_invalid":
        reason = str(problem["ctx"]["error"]) if "ctx" in problem else "malformed"
        return invalid(f"The body is not valid JSON: {reason}.", code="invalid_json")
    if isinstance(cause := problem.get("ctx", {}).get("error"), FieldError):
        # A nested model names its own field; where it gives the whole path, that is it already.
        path = cause.field if cause.field.split(".")[0] in ("", *location[:1]) else _path((*location, cause.field))
        return invalid(f"'{path}' {cause}.", path, "invalid_value")
    if not location:
        return invalid("The body must be a JSON object.", code="invalid_body")
    if kind == "extra_forbidden":
        name = _path(location)
        return invalid(f"Unknown field {shown(name)}.", shown(name)[1:-1], "unknown_field")
    if kind == "none_required":
        return invalid(f"'{_path(location)}' is not supported by this server.", _path(location), "unsupported_field")
    if kind == UNSUPPORTED_VALUE:
        return invalid(f"'{_path(location)}' {problem['msg']}.", _path(location), "unsupported_field")
    if kind == "missing":
        return invalid(f"'{_path(location)}' is required.", _path(location), "missing_field")
    for end, part in enumerate(location, 1):
        within = f"{location[end - 2]}.{part}" if end > 1 else part
        if (told := messages.get(within, messages.get(part))) is not None:
            path = _path(location[:end])
            return invalid(f"'{path}' {told}.", path, "invalid_value")
    return invalid(f"'{_path(location)}' {_demand(problem)}.", _path(location), "invalid_value")


_DEMANDS = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be an integer",
    "int_parsing_size": "must be an integer of at most 19 digits",
    "int_type": "must be an integer",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be an array",
    "model_type": "must be an object",
    "string_pattern_mismatch": "must match the regular expression {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
}
"""What a field must be, by pydantic's type of error: its own words are a Python programmer's."""


def _demand(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return f"must be {str(context['expected']).replace('True', 'true').replace('False', 'false')}"
    if kind not in _DEMANDS:
        return str(problem["msg"])
    if kind.endswith("_short") and context.get("min_length") == 1:
        return "must not be empty"
    return _DEMANDS[kind].format(**{name: _whole(value) for name, value in context.items()})


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(location: tuple[int | str, ...]) -> str:
    """``("stop", 2)`` -> ``stop[2]``, ``("collaboration", "rate")`` -> ``collaboration.rate``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"

"""The OpenAPI document: bodies are parsed by hand (see ``read_body``), so they are described here."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from msgspec import Struct
from pydantic.json_schema import models_json_schema

from server import __version__
from server.errors import ErrorResponse
from server.protocol.base import Strict

_REF = "#/components/schemas/{name}"

ERRORS = {
    400: "The request is not valid; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "No such model or path.",
    405: "The path has no such method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too many requests are waiting; see `Retry-After`.",
    431: "The headers are too large.",
    500: "Something broke here.",
    503: "Loading, shutting down or dead; see `Retry-After`.",
    504: "A model did not finish a step in time.",
}
BODY_ERRORS = (400, 401, 404, 408, 413, 415)
GENERATION_ERRORS = (*BODY_ERRORS, 429, 500, 503, 504)

_requests: set[type[Strict]] = set()
_responses: set[type[Struct]] = {ErrorResponse}


def operation(
    body: type[Strict] | None,
    response: type[Struct],
    errors: tuple[int, ...],
    *,
    stream: bool = False,
    example: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a route's decorator needs to be described well.

    Args:
        body: model of the request's body.
        response: struct of the response.
        errors: statuses that the route answers, beside 200.
        stream: whether it may answer with server-sent events.
        example: of the body, but for the model's name, which depends on what is served.
    """
    _responses.add(response)
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF.format(name=response.__name__)}}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": {"$ref": _REF.format(name=ErrorResponse.__name__)}}}
    described: dict[str, Any] = {
        "response_model": None,
        "responses": {200: {"description": "Success.", "content": content}}
        | {status: {"description": ERRORS[status], "content": error} for status in errors},
    }
    if body is not None:
        _requests.add(body)
        described["openapi_extra"] = {
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": _REF.format(name=body.__name__)},
                        "example": example or {},
                    }
                },
            }
        }
    return described


def document(app: FastAPI, model_name: str, question: dict[str, Any]) -> dict[str, Any]:
    """The whole document; made once.

    Args:
        model_name: what is served, for the examples.
        question: fields of a body that ask what the pair answers well, in the place of the examples' own.
    """
    if app.openapi_schema is None:
        schema = get_openapi(
            title="Co-LLM",
            version=__version__,
            description=(
                "A base model and a domain expert write one answer together; a gate decides for every token who "
                "writes it. OpenAI's API, with one object more: `collaboration`."
            ),
            routes=app.routes,
        )
        template = _REF.replace("{name}", "{model}")
        _, requests = models_json_schema(
            [(model, "validation") for model in sorted(_requests, key=lambda m: m.__name__)], ref_template=template
        )
        _, responses = msgspec.json.schema_components(
            sorted(_responses, key=lambda struct: struct.__name__), ref_template=_REF
        )
        for path in schema["paths"].values():
            for described in path.values():
                # The framework announces its own validation error wherever there is a parameter; we never send it.
                described["responses"].pop("422", None)
                if "requestBody" in described:
                    content = described["requestBody"]["content"]["application/json"]
                    content["example"] = {
                        "model": model_name,
                        **{field: question.get(field, value) for field, value in content["example"].items()},
                    }
                for parameter in described.get("parameters", ()):
                    if parameter["name"] == "id":
                        parameter["example"] = model_name
        components = schema.setdefault("components", {})
        components["schemas"] = dict(sorted((responses | requests.get("$defs", {})).items()))
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"apiKey": []}]
        app.openapi_schema = schema
    return app.openapi_schema

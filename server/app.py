"""The ASGI application: routes, middlewares and error handlers around one :class:`~server.service.Service`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from server import __version__
from server.asgi import error_response
from server.auth import ApiKeys
from server.context import RequestContext
from server.cors import Cors
from server.errors import ApiError, from_status
from server.example import example_question
from server.limits import RequestLimits
from server.openapi import document
from server.playground import mount_playground
from server.routes import chat, completions, models, ops, tokenize
from server.service import Service

if TYPE_CHECKING:
    from server.trace.spans import Traces


def create_app(service: Service, traces: Traces | None = None) -> FastAPI:
    """The application. The caller attaches an engine to the service once it has started; until then requests are
    answered 503.

    Args:
        traces: where generation requests are traced to, see :func:`server.trace.start.start_tracing`; ended by the
            caller.
    """
    app = FastAPI(title="Co-LLM", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.service = service
    app.openapi = lambda: document(app, service.models.name, example_question(service))  # type: ignore[method-assign]
    for router in (completions.router, chat.router, tokenize.router, models.router, ops.router):
        app.include_router(router)
    config = service.settings.server
    if config.playground != "off":
        mount_playground(app)
    _answer_head(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    # The last one added is the outermost.
    if keys := config.all_keys:
        app.add_middleware(ApiKeys, keys=keys, open_pages=config.playground == "open")
    app.add_middleware(
        RequestLimits,
        max_headers=config.max_headers,
        max_header_bytes=config.max_header_bytes,
        max_body_bytes=config.max_body_bytes,
        body_timeout=config.body_timeout_s,
    )
    if config.cors_allow_origins:
        app.add_middleware(
            Cors,
            allow_origins=config.cors_allow_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "Server-Timing"],
        )
    if traces is not None:
        from server.trace.middleware import TraceRequests

        app.add_middleware(TraceRequests, traces=traces)
    app.add_middleware(RequestContext, http_requests=service.metrics.http_requests, access_log=config.access_log)
    return app


def _answer_head(app: FastAPI) -> None:
    """Answer HEAD on every route that answers GET. The HTTP protocol leaves the body out."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and "GET" in route.methods:
            app.add_api_route(
                route.path, route.endpoint, methods=["HEAD"], response_model=None, include_in_schema=False
            )


async def _api_error(_request: Request, error: Any) -> Response:
    return error_response(error)


async def _http_error(_request: Request, error: Any) -> Response:
    return error_response(from_status(error.status_code, error.headers))

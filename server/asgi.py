"""What middlewares share."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError


def route_path(scope: Scope) -> str:
    """The request's path without the root path, which uvicorn puts before it; what the router matches."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if path.startswith(f"{root}/") else path


def error_response(error: ApiError) -> Response:
    """An error as a response."""
    return Response(error.body(), error.status, error.headers, "application/json")


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error, from a middleware."""
    await error_response(error)(scope, receive, send)

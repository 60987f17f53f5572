"""The outermost middleware: request ids, counting and logging of responses, and the catch-all error handler."""

from __future__ import annotations

import logging
import re
import time
import uuid

from prometheus_client import Counter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import log_response
from server.asgi import send_error
from server.disconnect import ClientGone
from server.errors import ApiError

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_GONE = "499"
"""In metrics and logs, the status of requests whose client hung up before the response began."""


class RequestContext:
    """Gives every request an id (the client's X-Request-Id, if it is one), and every response the same header.

    Args:
        http_requests: counter with the labels route, method and status.
        access_log: log a line for each response.
    """

    def __init__(self, app: ASGIApp, http_requests: Counter, *, access_log: bool = False) -> None:
        self._app = app
        self._access_log = access_log
        self._http_requests = http_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"] = request_id = _request_id(scope)
        status = _GONE
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            pass
        except Exception:
            logger.exception("request %s failed", request_id)
            if status != _GONE:
                raise
            error = ApiError(500, "Internal error.", code="internal_error")
            await send_error(error, scope, receive, send_with_id)
        finally:
            # Both labels are bounded: clients make up paths and methods.
            route = getattr(scope.get("route"), "path_format", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._http_requests.labels(route, method, status).inc()
            if self._access_log:
                log_response(scope, status, time.perf_counter() - started)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(text := value.decode("latin-1")):
            return str(text)
    return uuid.uuid4().hex

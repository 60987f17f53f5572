"""Limits on what a client may send: number and size of headers, size of the body and time that it takes.

What can only be seen below ASGI (a head that never ends, a reader that never reads) is in ``server.http_protocol``.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.asgi import send_error
from server.errors import ApiError


class RequestLimits:
    """Refuses requests that are too large or too slow, before they are held in memory.

    Args:
        max_headers: number of headers.
        max_header_bytes: path, query, names and values together.
        max_body_bytes: of the body, declared or sent.
        body_timeout: seconds for the whole body.
    """

    def __init__(
        self, app: ASGIApp, *, max_headers: int, max_header_bytes: int, max_body_bytes: int, body_timeout: float
    ) -> None:
        self._app = app
        self._max_headers = max_headers
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_head(scope)
            await self._app(scope, _Body(receive, self._max_body_bytes, self._body_timeout).receive, send)
        except ApiError as error:
            # Those of the body are raised inside the application, while it reads; nothing has been sent then.
            await send_error(error, scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        headers = scope["headers"]
        if len(headers) > self._max_headers:
            raise ApiError(431, f"More than {self._max_headers} headers.", code="too_many_headers")
        # h11 bounds a head that comes in pieces; one that is complete when it is first looked at is bounded here.
        path = scope.get("raw_path") or scope["path"].encode()  # the former is optional in ASGI
        size = len(path) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in headers) > self._max_header_bytes:
            message = f"Request line and headers of more than {self._max_header_bytes} bytes."
            raise ApiError(431, message, code="headers_too_large")
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # Where the body ends is a matter of opinion, and a proxy before us may have another one: nothing more is
            # read from this connection.
            raise ApiError(
                400,
                "Content-Length and Transfer-Encoding exclude each other.",
                code="malformed_http",
                headers={"Connection": "close"},
            )
        for name, value in headers:
            if name == b"content-length" and int(value) > self._max_body_bytes:
                raise _too_large(self._max_body_bytes)


class _Body:
    """Counts and times a body while it is read."""

    def __init__(self, receive: Receive, limit: int, timeout: float) -> None:
        self._receive = receive
        self._limit = limit
        self._timeout = timeout
        self._size = 0
        self._complete = False
        self._deadline: float | None = None

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time.", code="body_timeout") from None
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise _too_large(self._limit)
        self._complete = not message.get("more_body", False)
        return message


def _too_large(limit: int) -> ApiError:
    # What the client still sends is read and dropped, see server.http_protocol; the connection is of no more use.
    headers = {"Connection": "close"}
    return ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large", headers=headers)

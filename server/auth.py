"""API keys, and which client sent a request."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.asgi import route_path, send_error
from server.errors import ApiError
from server.playground import is_page

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What probes need; everything else asks for a key, but for the pages where they are configured to be open."""


class ApiKeys:
    """Lets requests through that carry one of the keys: ``Authorization: Bearer KEY``.

    The path is the one that the request line carries, never one rebuilt from the Host header.

    Args:
        keys: at least one.
        open_pages: the playground and the API reference are served without one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, open_pages: bool = False) -> None:
        self._app = app
        self._open_pages = open_pages
        # Digests have one length, so that comparing takes the same time whatever is sent.
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        scope["api_key"] = number = self._number(scope)
        if number is not None or self._is_open(path):
            await self._app(scope, receive, send)
            return
        message = "An API key is required: send 'Authorization: Bearer KEY'."
        if is_page(path):
            message += ' A browser cannot send one for a page; with server.playground = "open" pages need none.'
        error = ApiError(
            401,
            message,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await send_error(error, scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in OPEN_PATHS or (self._open_pages and is_page(path))

    def _number(self, scope: Scope) -> int | None:
        """Which of the keys was sent; None if it was none."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return None
        scheme, _, key = values[0].partition(b" ")
        sent = _digest(key.strip())
        # No early end: which key it was is not to be seen either.
        matches = [hmac.compare_digest(sent, digest) for digest in self._digests]
        number = max((number for number, match in enumerate(matches) if match), default=None)
        return number if scheme.lower() == b"bearer" else None


def client_of(scope: Scope) -> str:
    """The client that sent a request, for sharing the server fairly: the key's number, or the peer's address where no
    key is required.

    Nothing that a client could make up at will: the ``user`` field is not looked at, and of an IPv6 address only the
    network counts, since a host has 2**64 of them.
    """
    if (number := scope.get("api_key")) is not None:
        return f"key {number}"
    peer = scope.get("client")
    if peer is None:
        return ""
    try:
        address = ipaddress.ip_address(peer[0])
    except ValueError:
        return str(peer[0])[:64]  # a Unix socket's, or what a proxy made of it
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

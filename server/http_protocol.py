"""Uvicorn's HTTP/1.1 protocol on h11, with the limits that it lacks.

h11 rather than httptools: only h11 bounds the size of a request's head at all. What is added here: a time limit for the
head, an error object (431 where the head is too large) in place of plain text, a lingering close for clients that are
still sending a body that was refused, and an end to clients that don't read their response.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError

LINGER_S = 30.0
"""Seconds that a client may go on sending a body that was refused; nginx's lingering_time."""

LINGER_IDLE_S = 5.0
"""Seconds after which such a client is disconnected where it sends nothing; nginx's lingering_timeout."""


def limited_protocol(*, header_timeout: float, write_timeout: float) -> type[H11Protocol]:
    """The protocol with its time limits in seconds; uvicorn takes a class and makes one instance a connection."""

    class Configured(LimitedProtocol):
        pass

    Configured.header_timeout = header_timeout
    Configured.write_timeout = write_timeout
    return Configured


class _GentleTransport:
    """A transport that is closed in another way; all else is its own.

    Args:
        close: returns whether the connection lingers instead of being closed at once.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[], bool]) -> None:
        self._transport = transport
        self._close = close
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Close the connection."""
        self._lingers = self._close()

    def is_closing(self) -> bool:
        """Whether nothing more can be sent."""
        return self._lingers or self._transport.is_closing()


class LimitedProtocol(H11Protocol):
    """One connection."""

    header_timeout: float
    write_timeout: float
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _linger_until: float | None = None
    _deaf: bool = False
    _socket: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        # Uvicorn closes by itself where a response says "Connection: close", whatever the client is still sending.
        super().connection_made(cast("asyncio.Transport", _GentleTransport(transport, self._close)))
        self._socket = transport
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._head_arrived()
        self._end_linger_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of a body that was refused."""
        if self._linger_until is not None:
            self._linger(data)
            return
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_arrived()

    def on_response_complete(self) -> None:
        """Let a client whose body was refused finish sending it, see :meth:`_begin_lingering`. Where the body ends and
        both sides keep connections alive, this one is good for another request.
        """
        refused = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if refused and not self.transport.is_closing():
            self._begin_lingering()

    def _close(self) -> bool:
        """Close the connection, at once or in a while; returns whether it lingers."""
        if self._linger_until is None and self.conn.their_state in (h11.SEND_BODY, h11.ERROR):
            self._deaf = True
            self._begin_lingering()
            self.flow.resume_reading()
            if self._socket.can_write_eof():
                self._socket.write_eof()
            return True
        self._socket.close()
        return False

    def _begin_lingering(self) -> None:
        """Go on reading what the client sends, and drop it. Closing at once would reset the connection, and the client
        would lose the response that it has not read yet.
        """
        self._linger_until = self.loop.time() + LINGER_S
        self._linger_timer = self.loop.call_later(LINGER_IDLE_S, self._socket.close)

    def _linger(self, data: bytes) -> None:
        assert self._linger_until is not None
        self._end_linger_timer()
        left = self._linger_until - self.loop.time()
        if left <= 0:
            self._socket.close()
            return
        if not self._deaf:
            super().data_received(data)
            if self.conn.our_state is not h11.DONE:
                self._end_lingering()
                return
        self._linger_timer = self.loop.call_later(min(left, LINGER_IDLE_S), self._socket.close)

    def _end_lingering(self) -> None:
        """The body that was refused has ended."""
        self._linger_until = None
        if self.conn.their_state is not h11.IDLE:
            return
        if self.conn.trailing_data[0]:
            self._await_head()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _end_linger_timer(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: Java's HTTP client offers h2c with every request, and the offer may be ignored (RFC 9110, 7.8)."""

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's complaint about what was received."""
        complaint = sys.exc_info()[1]
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # A response is under way (the complaint is about the rest of a body): there is no room for another.
            self.transport.close()
            return
        status = complaint.error_status_hint if isinstance(complaint, h11.RemoteProtocolError) else 400
        if status == 431:
            self._send_error(ApiError(431, "The request's head is too large.", code="headers_too_large"))
        else:
            self._send_error(ApiError(400, "Malformed HTTP request.", code="malformed_http"))

    def pause_writing(self) -> None:
        """The client reads more slowly than we write; it has some time to read on."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout, self._head_overdue)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._send_error(ApiError(408, "The request's head did not arrive in time.", code="header_timeout"))
        else:
            self.transport.close()

    def _send_error(self, error: ApiError) -> None:
        body = error.body()
        headers: list[tuple[Any, Any]] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=b""),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

"""Uvicorn's HTTP/1.1 protocol on h11, with the limits that it lacks.

h11 rather than httptools: only h11 bounds the size of a request's head at all. What is added here: a time limit for the
head, an error object (431 where the head is too large) in place of plain text, a bounded farewell to clients that are
still sending a body nobody wants, and an end to clients that don't read their response.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError

LINGER_S = 2.0
LINGER_BYTES = 4 * 1024 * 1024


def limited_protocol(*, header_timeout: float, write_timeout: float) -> type[H11Protocol]:
    """The protocol with its time limits in seconds; uvicorn takes a class and makes one instance a connection."""

    class Configured(LimitedProtocol):
        pass

    Configured.header_timeout = header_timeout
    Configured.write_timeout = write_timeout
    return Configured


class LimitedProtocol(H11Protocol):
    """One connection."""

    header_timeout: float
    write_timeout: float
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _linger_left: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._head_arrived()
        self._end_linger_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of a body nobody wants."""
        if self._linger_left is not None:
            self._linger(data)
            return
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_arrived()

    def on_response_complete(self) -> None:
        """Give a client whose body was refused some time to end it: closing at once would reset the connection, and
        the client might lose the response with it. What it still sends is thrown away. Where the body does end, which
        it mostly does with the next packet, the connection is good for another request.
        """
        refused = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if refused and not self.transport.is_closing():
            self._linger_left = LINGER_BYTES
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _linger(self, data: bytes) -> None:
        assert self._linger_left is not None
        self._linger_left -= len(data)
        if self._linger_left < 0:
            self.transport.close()
            return
        super().data_received(data)
        if self.conn.our_state is h11.DONE:
            return
        # The body has ended, and with it the farewell.
        self._linger_left = None
        self._end_linger_timer()
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

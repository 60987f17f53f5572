"""HTTP by hand, for what a client library would be too polite to send."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.robustness.servers import FaultServer

SECONDS = 60.0


@dataclass
class Reply:
    """A response. Status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def connect(server: FaultServer, receive_buffer: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_buffer is not None:
        # Before connecting, or the window has been told already.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(SECONDS)
    sock.connect(("127.0.0.1", server.port))
    return sock


def head(server: FaultServer, *headers: bytes, method: bytes = b"POST", path: bytes = b"/v1/completions") -> bytes:
    """A request's head with Host, the key and the content type; what is given comes on top."""
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: house", b"Content-Type: application/json"]
    if server.key:
        lines.append(b"Authorization: Bearer " + server.key.encode())
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n"


def post(server: FaultServer, body: bytes, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    """A whole request."""
    return head(server, b"Content-Length: %d" % len(body), *headers, path=path) + body


def send(server: FaultServer, parts: bytes | Iterable[bytes]) -> Reply:
    """Send bytes on a connection of their own, then read one response."""
    with connect(server) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in [parts] if isinstance(parts, bytes) else parts:
                sock.sendall(part)
        return receive(sock)


def send_in_a_row(server: FaultServer, requests: Iterable[bytes]) -> list[Reply]:
    """Send requests at once on one connection. The server takes up each of them when it has answered the one before, so
    what it says of itself in one answer is as of then, however long this process has to wait for its turn.
    """
    requests = list(requests)
    replies: list[Reply] = []
    rest = b""
    with connect(server) as sock:
        sock.sendall(b"".join(requests))
        for _ in requests:
            reply, rest = _receive(sock, rest)
            replies.append(reply)
    return replies


def receive(sock: socket.socket) -> Reply:
    """Read one response that has a length; of what follows on the connection nothing is kept."""
    return _receive(sock, b"")[0]


def _receive(sock: socket.socket, data: bytes) -> tuple[Reply, bytes]:
    """One response, of which ``data`` was read before, and what was read beyond it."""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in data and (more := sock.recv(65536)):
            data += more
    if b"\r\n\r\n" not in data:
        return Reply(0, {}, data), b""
    first, _, body = data.partition(b"\r\n\r\n")
    lines = first.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length = int(headers.get("content-length", 0))
    while len(body) < length and (more := sock.recv(65536)):
        body += more
    if "content-length" not in headers:
        length = len(body)
    return Reply(int(lines[0].split()[1]), headers, body[:length]), body[length:]


def hang_up(sock: socket.socket) -> None:
    """Close with a reset, as a client that is killed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()

"""Cases 13 to 17 of the fault list: what is wrong below or beside the body, with raw sockets, live."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.robustness import raw
from tests.robustness.conftest import KEY
from tests.robustness.servers import MODEL, FaultServer, check_error, check_error_body

BODY = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 4}).encode()
MEGABYTE = b" " * (1 << 20)


@pytest.fixture(autouse=True)
def _ends_well(live: FaultServer) -> Any:
    yield
    live.check_good()


def _refused(reply: raw.Reply, *statuses: int) -> None:
    assert reply.status in statuses, reply
    check_error_body(reply.json())


# -- 13: large bodies -----------------------------------------------------------------------------------------


def test_13_a_declared_body_of_60_mb(live: FaultServer) -> None:
    _refused(raw.send(live, raw.head(live, b"Content-Length: 60000000")), 413)
    _refused(raw.send(live, raw.head(live, b"Content-Length: 60000000", b"Expect: 100-continue")), 413)


def test_13_a_body_of_60_mb_is_not_held(live: FaultServer) -> None:
    """Refused before it is read whole: the process does not grow by it. With a length, and chunked."""
    before = live.parent().memory_info().rss
    _refused(raw.send(live, [raw.head(live, b"Content-Length: 62914560"), *[MEGABYTE] * 60]), 413)
    chunk = b"100000\r\n" + MEGABYTE + b"\r\n"
    _refused(raw.send(live, [raw.head(live, b"Transfer-Encoding: chunked"), *[chunk] * 60]), 413)
    assert live.parent().memory_info().rss - before < 40 * (1 << 20)


def test_13_a_refused_body_does_not_cost_the_connection(live: FaultServer) -> None:
    """A client that sends the head first is refused by it alone; its next request on the connection is served."""
    with raw.connect(live) as sock:
        for refused, status in ((b"Content-Type: text/plain", 415), (b"X-Nothing: 1", 404)):
            path = b"/v1/completions" if status == 415 else b"/v1/nothing"
            head = raw.head(live, b"Content-Length: %d" % len(BODY), path=path)
            if status == 415:
                head = head.replace(b"Content-Type: application/json", refused)
            sock.sendall(head)
            _refused(raw.receive(sock), status)
            sock.sendall(BODY)
            sock.sendall(raw.post(live, BODY))
            assert raw.receive(sock).status == 200


# -- 14: large heads ------------------------------------------------------------------------------------------


def test_14_headers_of_5_mb(live: FaultServer) -> None:
    parts = [raw.head(live)[:-2], b"X-Large: ", *[b"a" * (1 << 16)] * 80, b"\r\n\r\n", BODY]
    # The answer may be lost to the reset that megabytes of unread bytes bring.
    assert raw.send(live, parts).status in (0, 431)
    _refused(raw.send(live, raw.post(live, BODY, b"X-Large: " + b"a" * 100_000)), 431)


def test_14_2000_headers(live: FaultServer) -> None:
    _refused(raw.send(live, raw.post(live, BODY, *[b"X-%d: 1" % number for number in range(2000)])), 431, 400)
    _refused(raw.send(live, raw.post(live, BODY, *[b"X: 1"] * 101)), 431, 400)


def test_14_a_path_of_5_mb(live: FaultServer) -> None:
    assert raw.send(live, raw.head(live, path=b"/" + b"a" * 5_000_000)).status in (0, 414, 431)
    _refused(raw.send(live, raw.head(live, path=b"/" + b"a" * 50_000)), 414, 431)


# -- 15: slow clients -----------------------------------------------------------------------------------------


def test_15_a_head_that_does_not_come(live: FaultServer) -> None:
    _refused(raw.send(live, raw.head(live)[:30]), 408)


def test_15_nothing_at_all(live: FaultServer) -> None:
    with raw.connect(live) as sock:
        assert sock.recv(100) == b""


def test_15_a_head_a_byte_at_a_time(live: FaultServer) -> None:
    """A trickle does not help: the whole head has one deadline."""
    with raw.connect(live) as sock:
        reply = b""
        sock.settimeout(0.1)
        for number in range(600):
            try:
                sock.sendall(raw.post(live, BODY, b"X: " + b"a" * 8000)[number : number + 1])
                reply = sock.recv(1000)
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the connection was kept")
        assert reply == b"" or reply.startswith(b"HTTP/1.1 408")


def test_15_bodies_that_never_end(live: FaultServer) -> None:
    _refused(raw.send(live, raw.head(live, b"Content-Length: 500") + BODY), 408)
    _refused(raw.send(live, raw.head(live, b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n"), 408)

    def trickle() -> Iterator[bytes]:
        yield raw.head(live, b"Content-Length: 100000")
        for _ in range(40):
            time.sleep(0.1)
            yield b" "

    assert raw.send(live, trickle()).status in (0, 408)


def test_15_200_slow_clients_are_nobodys_problem(live: FaultServer) -> None:
    socks = [raw.connect(live) for _ in range(200)]
    for sock in socks:
        sock.sendall(raw.head(live)[:40])
    live.check_good()
    for sock in socks:
        assert raw.receive(sock).status in (0, 408)
        sock.close()


# -- 16: garbage ----------------------------------------------------------------------------------------------

CHUNKED = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("length", [5, len(BODY), len(CHUNKED)])
def test_16_content_length_with_transfer_encoding(live: FaultServer, length: int) -> None:
    """Whoever is in front may believe the other one. Nothing more is read from such a connection."""
    smuggled = raw.head(live, method=b"GET", path=b"/v1/models")
    with raw.connect(live) as sock:
        head = raw.head(live, b"Content-Length: %d" % length, b"Transfer-Encoding: chunked")
        sock.sendall(head + CHUNKED + smuggled)
        _refused(raw.receive(sock), 400)
        try:
            rest = sock.recv(65536)
        except ConnectionResetError:
            rest = b""
        assert b"200 OK" not in rest


def test_16_garbage(live: FaultServer) -> None:
    rows = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",
        b"\x00" * 1000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nBad Header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nBad\x00: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n folded: b\r\n\r\n",
        raw.post(live, BODY, b"Content-Length: 3"),
        raw.head(live, b"Content-Length: -3"),
        raw.head(live, b"Content-Length: 0x10"),
        raw.head(live, b"Content-Length: " + b"9" * 5000),
        raw.head(live, b"Transfer-Encoding: chunked") + b"zz\r\n",
        raw.head(live, b"Transfer-Encoding: chunked") + b"-5\r\nhello\r\n",
        raw.head(live, b"Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\n",
        raw.head(live, b"Transfer-Encoding: gzip"),
        raw.head(live, b"Transfer-Encoding: chunked, chunked"),
    ]
    for row in rows:
        reply = raw.send(live, row)
        # Folded headers are obsolete but legal; without the key that request is refused all the same.
        # A chunk that is longer than it will ever be is waited for, until the body's time is over.
        assert reply.status in (400, 401, 408, 413, 501, 505), (row[:80], reply)
        check_error_body(reply.json())


def test_16_upgrades_are_ignored(live: FaultServer) -> None:
    reply = raw.send(live, raw.post(live, BODY, b"Connection: Upgrade", b"Upgrade: websocket"))
    assert reply.status == 200


# -- 17: keys -------------------------------------------------------------------------------------------------


def _routes(live: FaultServer) -> list[tuple[str, str]]:
    with live.http() as http:
        document = http.get("/openapi.json").json()
    described = [
        (method.upper(), path.replace("{id}", MODEL))
        for path, methods in document["paths"].items()
        for method in methods
    ]
    return [
        *described,
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
        ("GET", "/nothing"),
        ("GET", "//ready"),
    ]


def test_17_every_route_but_two_asks_for_a_key(live: FaultServer) -> None:
    routes = _routes(live)
    assert len(routes) >= 14
    wrong: list[list[bytes]] = [
        [],
        [b"Authorization: Bearer wrong"],
        [b"Authorization: Bearer"],
        [b"Authorization: Bearer "],
        [b"Authorization: Basic " + KEY.encode()],
        [b"Authorization: " + KEY.encode()],
        [b"Authorization: Bearer " + KEY.encode() + b"x"],
        [b"Authorization: Bearer " + KEY[:-1].encode()],
        [b"Authorization: Bearer " + KEY.upper().encode()],
        [b"Authorization: Bearer \xff\xfe\xfd"],
        [b"Authorization: Bearer " + KEY.encode(), b"Authorization: Bearer wrong"],
        [b"X-Api-Key: " + KEY.encode()],
        [b"Cookie: key=" + KEY.encode()],
    ]
    for method, path in routes:
        for headers in wrong:
            reply = _plain(live, method, path, *headers)
            if path in ("/health", "/ready"):
                assert reply.status == 200
                continue
            assert reply.status == 401, (method, path, headers, reply)
            assert reply.headers["www-authenticate"] == "Bearer"
            error = check_error_body(reply.json())
            assert error["code"] == "invalid_api_key"
            assert KEY not in reply.body.decode()


def _plain(live: FaultServer, method: str, path: str, *headers: bytes, host: bytes = b"house") -> raw.Reply:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: " + host, b"Connection: close", *headers]
    return raw.send(live, b"\r\n".join(lines) + b"\r\n\r\n")


@pytest.mark.parametrize(
    "host", [b"127.0.0.1/health?", b"house/ready#", b"x/health", b"localhost:0/../health", b"/health", b"health"]
)
def test_17_the_host_header_opens_nothing(live: FaultServer, host: bytes) -> None:
    """A path that is rebuilt from the Host header has opened servers before."""
    assert _plain(live, "GET", "/v1/models", host=host).status in (400, 401)
    absolute = _plain(live, "GET", "http://x/health/../v1/models", host=host)
    assert absolute.status in (400, 401, 404)
    assert b'"data"' not in absolute.body


@pytest.mark.parametrize(
    "path", ["/health/../v1/models", "/health%2f..%2fv1/models", "/HEALTH", "/health/", "/ready/x"]
)
def test_17_paths_that_look_open_are_not(live: FaultServer, path: str) -> None:
    assert _plain(live, "GET", path).status in (400, 401)


def test_17_headers_of_proxies_open_nothing(live: FaultServer) -> None:
    for header in (b"X-Forwarded-Prefix: /health", b"X-Original-URL: /health", b"X-Forwarded-For: 127.0.0.1"):
        assert _plain(live, "GET", "/v1/models", header).status == 401


def test_17_the_right_key(live: FaultServer) -> None:
    with live.http() as http:
        assert http.get("/v1/models").status_code == 200
        response = http.get("/v1/models", headers={"Authorization": f"bearer {KEY}"})
        assert response.status_code == 200
        check_error(http.get("/v1/models", headers={"Authorization": "Bearer wrong"}), 401)


def test_17_keys_are_not_logged(live: FaultServer) -> None:
    assert KEY not in live.output()
    assert "ready at" in live.output()

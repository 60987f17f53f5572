"""Characters at which some take a line to end, and which an answer may hold all the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from tests.server.commands.conftest import Terminal, piped

TOKENS = ["one\u2028two", "\u2029", "three\x85four", "\x0b\x0c\x1c\x1d\x1e", "five\r\nsix", " 日"]
TEXT = "".join(TOKENS)


class Answering(BaseHTTPRequestHandler):
    """Streams TOKENS, byte by byte, in JSON that escapes no more than it must."""

    asked: ClassVar[list[dict[str, object]]] = []
    sure: ClassVar[list[str] | None] = None

    def do_GET(self) -> None:
        self._send("application/json", b'{"data": [{"id": "m", "max_model_len": 8}]}')

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        chunks = []
        for token in TOKENS:
            report = {"tokens": [token], "sources": ["codes"], "deferral_probabilities": [0.9]}
            if self.sure is not None:
                report["check"] = [token not in self.sure]
            answer = {"delta": {"content": token}} if "chat" in self.path else {"text": token}
            chunks.append({"choices": [{**answer, "finish_reason": None, "collaboration": report}]})
        events = [json.dumps(chunk, ensure_ascii=False) for chunk in chunks]
        self._send("text/event-stream", "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode())

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(len(body)):
            self.wfile.write(body[start : start + 1])
            self.wfile.flush()


@pytest.fixture
def answering() -> Iterator[str]:
    Answering.asked.clear()
    Answering.sure = None
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def shown(text: str) -> str:
    """As reading a text file gives it."""
    return text.replace("\r\n", "\n")


def test_complete(answering: str) -> None:
    result = piped(["complete", "x"], answering)
    assert (result.status, result.err, result.out) == (0, "", shown(TEXT) + "\n")


def test_chat_keeps_them_in_the_conversation(answering: str) -> None:
    result = piped(["chat"], answering, stdin="a\u2028b\x85c\nagain\n")
    assert (result.status, result.err, result.out) == (0, "", (shown(TEXT) + "\n") * 2)
    assert Answering.asked[1]["messages"] == [
        {"role": "user", "content": "a\u2028b\x85c"},
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "again"},
    ]


def test_in_a_terminal(answering: str, terminal: type[Terminal]) -> None:
    result = terminal(["complete", "x"], answering, NO_COLOR="1").end()
    assert result.status == 0
    assert "one\u2028two\u2029three\ufffdfour␋␌␜␝␞five" in result.out


def test_tokens_that_deserve_a_second_look(answering: str, terminal: type[Terminal]) -> None:
    Answering.sure = TOKENS[:-1]
    result = terminal(["complete", "x", "--veto", "0.25"], answering).end()
    assert Answering.asked[0]["collaboration"] == {"veto": 0.25, "report": True}
    assert "\x1b[4;21;33m 日\x1b[0m" in result.out
    assert "1 to be checked" in result.out

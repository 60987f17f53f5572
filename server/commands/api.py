"""A server's HTTP API as the commands use it; whatever goes wrong is one line and exit status 1."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import click
import httpx

URL = "http://127.0.0.1:8000"
CONNECT_S = 10.0


class CommandError(click.ClickException):
    """Something failed; shown as ``error: MESSAGE`` on one line."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status

    def show(self, file: IO[Any] | None = None) -> None:
        """Write it to the standard error stream."""
        click.echo(f"error: {self.message}", file=file, err=True)


@dataclass(frozen=True, slots=True)
class Token:
    """A written token.

    Attributes:
        text: may be empty, for the end of the text or a part of a character.
        source: "base" or an expert's name.
        deferral: the gate's probability; None where it was not asked.
        check: it deserves a second look.
    """

    text: str
    source: str
    deferral: float | None
    check: bool = False


@dataclass(slots=True)
class Piece:
    """What a chunk of a stream adds.

    Attributes:
        by_characters: the members write together by characters: the ``tokens`` are pieces of text.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    by_characters: bool = False


class Api:
    """One server.

    Args:
        url: its address, with or without ``/v1``.
        key: API key, or None.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S))
        except (UnicodeEncodeError, httpx.InvalidURL):
            raise CommandError("COLLM_API_KEY has characters that no header can carry") from None

    def models(self) -> list[dict[str, Any]]:
        """Served models, the joint one first.

        Raises:
            CommandError: the server does not answer as it should.
        """
        models: list[dict[str, Any]] = self._get("/v1/models").json()["data"]
        return models

    def joint_model(self) -> str:
        """Name of the joint model.

        Raises:
            CommandError: the server does not answer as it should.
        """
        return str(self.models()[0]["id"])

    def metrics(self) -> str:
        """The metrics, in Prometheus' format.

        Raises:
            CommandError: the server does not answer as it should.
        """
        return self._get("/metrics").text

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Piece]:
        """Pieces of one choice of a completion or of a chat answer. Closing it early stops the server's work.

        Raises:
            CommandError: the request was refused, or failed on its way.
        """
        with self._errors(), self._http.stream("POST", f"{self.url}{path}", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise self._failure(response, str(body.get("model", "")))
            for line in _lines(response.iter_bytes()):
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise CommandError(str(chunk["error"]["message"]))
                for choice in chunk["choices"]:
                    yield _piece(choice)

    def _get(self, path: str) -> httpx.Response:
        with self._errors():
            response = self._http.get(f"{self.url}{path}", timeout=CONNECT_S)
            if response.status_code != 200:
                raise self._failure(response)
            return response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise CommandError(
                f"no server at {self.url} ({str(error) or 'timeout'}); start one with 'collm serve', or name one with "
                "--url or COLLM_URL"
            ) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL):
            raise CommandError(f"{self.url!r} is no address such as {URL}") from None
        except httpx.HTTPError as error:
            raise CommandError(f"the connection to {self.url} failed: {str(error) or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError, IndexError):
            raise CommandError(f"{self.url} does not answer as a Co-LLM server does") from None

    def _failure(self, response: httpx.Response, model: str = "") -> CommandError:
        status = response.status_code
        if status == 401:
            return CommandError("the server asks for an API key: set COLLM_API_KEY to one that it knows", status)
        try:
            error = response.json()["error"]
            message, code = str(error["message"]), error["code"]
        except (ValueError, KeyError, TypeError):
            return CommandError(f"{self.url} answered {status}, not as a Co-LLM server does", status)
        if code == "model_not_found":
            served = ", ".join(str(card["id"]) for card in self.models())
            return CommandError(f"there is no model {model!r}; served are {served}", status)
        return CommandError(f"{message} ({status}{f', {code}' if code else ''})", status)


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of an event stream. httpx's own also end at U+2028 and the like, which JSON's strings may hold."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
    yield rest


def _piece(choice: dict[str, Any]) -> Piece:
    text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
    report = choice.get("collaboration")
    tokens = []
    if report is not None:
        columns = [report["tokens"], report["sources"], report["deferral_probabilities"]]
        if "check" in report:
            columns.append(report["check"])
        tokens = [Token(*column) for column in zip(*columns, strict=True)]
    return Piece(text, tokens, choice["finish_reason"], by_characters=report is not None and "pieces" in report)

"""One request to generate, from its admission to its last byte."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.admission import Places
from server.call import Call
from server.choice import Choice
from server.disconnect import ClientGone, unless_gone
from server.errors import ApiError
from server.generation import collect, merged
from server.protocol.common import GenerationFields
from server.protocol.responses import encode
from server.rendering.common import Renderer
from server.usage import UsageCounter

DONE = b"data: [DONE]\n\n"
_LINE_ENDS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029"]
"""Characters at which some take a line to end, and their escapes; JSON escapes the others, which are ASCII, anyway."""

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is ready to run.

    Attributes:
        prompt_tokens: of all prompts, each once.
    """

    choices: list[Choice]
    renderer: Renderer
    prompt_tokens: int


Prepare = Callable[[Call[Body], Places], Awaitable[Prepared]]
"""Does what has to wait for admission (tokenising), and the rest of the validation."""


async def serve(call: Call[Body], count: int, param: str, prepare: Prepare[Body]) -> Response:
    """Answer a request, for as long as its client is there.

    A stream's headers are sent with its first event: whatever goes wrong before that has its own status.

    Args:
        count: generation requests that it needs.
        param: the field to blame for needing too many.

    Raises:
        ApiError: with the status to answer.
        ClientGone: the client hung up; what ran was aborted.
    """
    parts = _run(call, count, param, prepare)
    try:
        first = await unless_gone(call.request.receive, anext(parts))
    except BaseException as error:
        # Where this request was cancelled just as the first part came, the generator has not ended.
        await parts.aclose()
        if isinstance(error, ApiError) and error.status == 429:
            call.meter.outcomes["rejected"].inc()
        raise
    headers = {}
    if call.account.usage is not None:
        headers["Server-Timing"] = call.account.usage.server_timing(time.perf_counter() - call.started)
    if call.body.stream:
        return EventStream(first, parts, headers)
    await parts.aclose()
    return Response(first, media_type="application/json", headers=headers)


async def _run(call: Call[Body], count: int, param: str, prepare: Prepare[Body]) -> AsyncGenerator[bytes, None]:
    """Reserve, prepare, run: yields the whole response, or its events if it is to be streamed."""
    body = call.body
    with call.service.admission.reserve(call.client, count, param) as places:
        prepared = await prepare(call, places)
        call.meter.prompt_tokens.inc(prepared.prompt_tokens)
        renderer = prepared.renderer
        counter = UsageCounter(prepared.prompt_tokens, prepared.choices, call.service.models.lane_names, call.member)
        call.account.usage = counter
        if not body.stream:
            await collect(call.engine, prepared.choices)
            for choice in prepared.choices:
                counter.add(choice.piece)
            yield encode(renderer.response(prepared.choices, counter.usage()))
            return
        begun = False
        try:
            async with aclosing(merged(call.engine, prepared.choices)) as pieces:
                async for choice, piece in pieces:
                    counter.add(piece)
                    usage = counter.usage() if body.continuous_usage else None
                    for chunk in renderer.chunks(choice, piece, usage):
                        begun = True
                        yield frame(encode(chunk))
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, ApiError):
                logger.exception("a stream failed")
                error = ApiError(500, "Internal error.", code="internal_error")
            call.account.error = error.code or error.type
            yield frame(error.body())
            return
        if body.include_usage:
            yield frame(encode(renderer.usage_chunk(counter.usage())))
        yield DONE


def frame(data: bytes) -> bytes:
    """One server-sent event.

    Args:
        data: JSON in UTF-8.
    """
    if not data.isascii():
        # The standard ends lines at CR and LF alone, but many readers split as str.splitlines does (httpx among them).
        # Beyond ASCII, JSON has nothing but the characters of strings, and those may be escaped.
        for character, escape in _LINE_ENDS:
            data = data.replace(character, escape)
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Server-sent events.

    Args:
        first: the first event, which exists before the headers are sent.
        rest: the others. It is closed when the client goes.
        headers: beside those of any stream.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        # The base class has counted its empty body.
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, until the end or until the client goes."""
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._rest:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

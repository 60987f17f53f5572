"""From pieces to bytes: the whole response, or server-sent events, and noticing that the client has gone."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.admission import Places
from server.disconnect import ClientGone, unless_gone
from server.engine_port import Engine
from server.errors import ApiError
from server.generation import Choice, collect, merged
from server.metrics import ModelMeter
from server.protocol.responses import encode
from server.rendering.common import Renderer, UsageCounter
from server.service import Service

DONE = b"data: [DONE]\n\n"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that is ready to run.

    Attributes:
        prompt_tokens: of all prompts, each once.
        include_usage: a stream ends with a usage chunk.
        continuous_usage: every chunk carries the usage so far.
    """

    choices: list[Choice]
    renderer: Renderer
    prompt_tokens: int
    include_usage: bool = False
    continuous_usage: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """How to serve a request.

    Attributes:
        client: whose request it is.
        places: generation requests that it needs.
        places_param: the field to blame for needing too many.
        prepare: does what has to wait for admission (tokenising), and the rest of the validation.
    """

    engine: Engine
    client: str
    meter: ModelMeter
    places: int
    places_param: str
    prepare: Callable[[], Awaitable[Answer]]
    stream: bool


async def respond(request: Request, service: Service, job: Job) -> Response:
    """Admit, prepare and run a job, for as long as its client is there.

    A stream's headers are sent with its first event: whatever goes wrong before that has its own status.

    Raises:
        ApiError: with the status to answer.
        ClientGone: nobody is there any more; what ran was aborted.
    """
    try:
        if not job.stream:
            body = await unless_gone(request.receive, _whole(service, job))
            return Response(body, media_type="application/json")
        events = _events(service, job)
        try:
            first = await unless_gone(request.receive, anext(events))
        except BaseException:
            # Where this request was cancelled just as the first event came, the generator has not ended.
            await events.aclose()
            raise
        return EventStream(first, events)
    except ApiError as error:
        if error.status == 429:
            job.meter.outcomes["rejected"].inc()
        raise


async def _prepared(job: Job, places: Places) -> Answer:
    answer = await job.prepare()
    job.meter.prompt_tokens.inc(answer.prompt_tokens)
    for choice in answer.choices:
        choice.on_end = places.end_one
    return answer


async def _whole(service: Service, job: Job) -> bytes:
    with service.admission.reserve(job.client, job.places, job.places_param) as places:
        answer = await _prepared(job, places)
        await collect(job.engine, answer.choices)
        counter = UsageCounter(answer.prompt_tokens)
        for choice in answer.choices:
            counter.add(choice.piece)
        return encode(answer.renderer.response(answer.choices, counter.usage()))


async def _events(service: Service, job: Job) -> AsyncGenerator[bytes, None]:
    begun = False
    with service.admission.reserve(job.client, job.places, job.places_param) as places:
        answer = await _prepared(job, places)
        renderer, counter = answer.renderer, UsageCounter(answer.prompt_tokens)
        try:
            async with aclosing(merged(job.engine, answer.choices)) as pieces:
                async for choice, piece in pieces:
                    counter.add(piece)
                    usage = counter.usage() if answer.continuous_usage else None
                    for chunk in renderer.chunks(choice, piece, usage):
                        begun = True
                        yield frame(chunk)
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, ApiError):
                logger.exception("a stream failed")
                error = ApiError(500, "Internal error.", code="internal_error")
            yield b"data: " + error.body() + b"\n\n"
            return
        if answer.include_usage:
            yield frame(renderer.usage_chunk(counter.usage()))
        yield DONE


def frame(chunk: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(chunk) + b"\n\n"


class EventStream(Response):
    """Server-sent events.

    Args:
        first: the first event, which exists before the headers are sent.
        rest: the others. It is closed when the client goes.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
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

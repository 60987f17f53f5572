"""What the two routes that generate have in common: how a request is read, what its choices and answer are made of."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastapi import Request, Response

from engine.types import Collaboration, EngineInfo, GenerationRequest, SamplingSpec
from server.auth import client_of
from server.engine_port import Engine
from server.errors import invalid
from server.generation import Choice
from server.metrics import RequestMeter
from server.protocol.common import GenerationFields, read_body
from server.rendering.common import Head, Renderer
from server.routes import service_of
from server.service import Service
from server.stream import Answer, Job, respond
from server.text.pieces import PieceBuilder

Body = TypeVar("Body", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class Call(Generic[Body]):
    """A request to generate, on its way from its body to its answer.

    Attributes:
        member: number of the lane that is asked for alone; None for the joint model.
        client: whose request it is, see :func:`server.auth.client_of`.
        started: when it came, by ``time.perf_counter``.
        id: of the response; those of its choices begin with it.
    """

    request: Request
    service: Service
    engine: Engine
    body: Body
    member: int | None
    client: str
    started: float
    id: str

    @property
    def info(self) -> EngineInfo:
        """The running engine."""
        return self.engine.info

    def collaboration(self) -> Collaboration:
        """Who may write.

        Raises:
            ApiError: 400, naming the field.
        """
        return self.service.models.collaboration(self.member, self.body.collaboration, self.info)

    def to_generate(
        self, index: int, prompt: list[int], sampling: SamplingSpec, collaboration: Collaboration
    ) -> GenerationRequest:
        """What the engine is asked for choice ``index``."""
        return GenerationRequest(f"{self.id}-{index}", prompt, sampling, collaboration, client=self.client)

    def choice(
        self,
        index: int,
        prompt: list[int],
        generation: GenerationRequest | None,
        *,
        prompt_index: int = 0,
        prompt_only: bool = False,
    ) -> Choice:
        """A choice that nothing has been written of; see :class:`~server.generation.Choice`."""
        body, service = self.body, self.service
        return Choice(
            index=index,
            prompt_index=prompt_index,
            request=generation,
            prompt_only=prompt_only,
            builder=PieceBuilder(
                service.tokenizer.detokenizer(prompt, skip_special_tokens=body.skip_special_tokens is not False),
                stop=body.stop_strings,
                include_stop=bool(body.include_stop_str_in_output),
                min_tokens=body.min_tokens or 0,
            ),
            meter=RequestMeter(service.metrics.model(body.model), joint=self.member is None, started=self.started),
            grammar_param=body.grammar_param,
        )

    def head(self) -> Head:
        """What each chunk and the response begin with."""
        name = self.id
        if self.body.request_id is not None:
            name = f"{self.id.partition('-')[0]}-{self.body.request_id}"
        return Head(name, int(time.time()), self.body.model, self.service.fingerprint)

    def answer(self, choices: list[Choice], renderer: Renderer, prompt_tokens: int) -> Answer:
        """The request, ready to run. ``prompt_tokens`` are those of all prompts, each once."""
        body = self.body
        return Answer(
            choices,
            renderer,
            prompt_tokens,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
        )

    async def respond(self, places: int, places_param: str, prepare: Callable[[], Awaitable[Answer]]) -> Response:
        """Admit, prepare and run; the arguments are those of :class:`~server.stream.Job`."""
        meter = self.service.metrics.model(self.body.model)
        job = Job(self.engine, self.client, meter, places, places_param, prepare, stream=bool(self.body.stream))
        return await respond(self.request, self.service, job)


async def receive(request: Request, body_type: type[Body], id_prefix: str) -> Call[Body]:
    """Read a request to generate.

    Raises:
        ApiError: its body is not valid, its model unknown, or the engine not ready.
    """
    service = service_of(request)
    started = time.perf_counter()
    body = await read_body(request, body_type)
    member = service.models.member(body.model)
    most = service.settings.server.max_stop_strings
    if len(body.stop_strings) > most:
        raise invalid(
            f"'stop' has {len(body.stop_strings)} strings; this server takes at most {most} (server.max_stop_strings).",
            "stop",
        )
    engine = service.ready_engine()
    client = client_of(request.scope)
    return Call(request, service, engine, body, member, client, started, f"{id_prefix}-{uuid.uuid4().hex}")

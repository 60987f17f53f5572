"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid

from fastapi import APIRouter, Request, Response

from engine.types import EngineInfo, GenerationRequest
from server.engine_port import Engine
from server.errors import invalid, shown
from server.generation import Choice
from server.metrics import RequestMeter
from server.openapi import GENERATION_ERRORS, operation
from server.protocol.chat import ChatRequest
from server.protocol.common import read_body
from server.protocol.responses import ChatResponse
from server.rendering.chat import ChatRenderer
from server.routes import service_of
from server.sampling import check_length, check_prompt, fit, for_choice, sampling_of
from server.service import Service
from server.stream import Answer, Job, respond
from server.text.chat_template import ChatTemplateError
from server.text.pieces import PieceBuilder

router = APIRouter(tags=["generation"])


_EXAMPLE = {
    "messages": [{"role": "user", "content": "What is the alpha-3 code of Liberia?"}],
    "max_tokens": 40,
    "temperature": 0,
    "collaboration": {"report": True},
}


@router.post(
    "/v1/chat/completions",
    **operation(ChatRequest, ChatResponse, GENERATION_ERRORS, stream=True, example=_EXAMPLE),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, by the chat template of the base model's tokenizer.

    With ``stream`` the response is a series of server-sent events, ``data: {...}``, ended by ``data: [DONE]``.
    """
    service = service_of(request)
    started = time.perf_counter()
    body = await read_body(request, ChatRequest)
    member = service.models.member(body.model)
    engine = service.ready_engine()
    job = Job(
        engine=engine,
        meter=service.metrics.model(body.model),
        places=body.n or 1,
        places_param="n",
        prepare=lambda: _prepare(service, engine, body, member, started),
        stream=bool(body.stream),
    )
    return await respond(request, service, job)


async def _prepare(service: Service, engine: Engine, body: ChatRequest, member: int | None, started: float) -> Answer:
    info = engine.info
    collaboration = service.models.collaboration(member, body.collaboration, info)
    sampling = sampling_of(body, info, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    prompt = await _prompt_ids(service, body, info)
    check_prompt(prompt, info.vocab_size, "messages")
    limit = fit(len(prompt), body.limit, None, info.max_model_len, "messages", body.limit_name)
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    meter = service.metrics.model(body.model)
    choices = [
        Choice(
            index=index,
            prompt_index=0,
            request=GenerationRequest(
                f"{response_id}-{index}", prompt, for_choice(sampling, index, limit), collaboration
            ),
            builder=PieceBuilder(
                service.tokenizer.detokenizer(),
                stop=body.stop_strings,
                include_stop=bool(body.include_stop_str_in_output),
                min_tokens=body.min_tokens or 0,
            ),
            meter=RequestMeter(meter, joint=member is None, started=started),
            refusal_param=body.grammar_param,
        )
        for index in range(body.n or 1)
    ]
    renderer = ChatRenderer(
        body,
        service.tokenizer,
        service.models.lane_names,
        prompt_ids=prompt,
        response_id=response_id,
        created=int(time.time()),
        fingerprint=service.fingerprint,
    )
    return Answer(
        choices, renderer, len(prompt), include_usage=body.include_usage, continuous_usage=body.continuous_usage
    )


async def _prompt_ids(service: Service, body: ChatRequest, info: EngineInfo) -> list[int]:
    template = service.chat_template
    if template is None:
        raise invalid("The served tokenizer has no chat template; use /v1/completions.", "messages", "no_chat_template")
    messages = [message.for_template() for message in body.messages]
    try:
        text = await asyncio.to_thread(template.render, messages)
    except ChatTemplateError as error:
        raise invalid(f"The chat template refuses these messages: {shown(str(error), 200)}.", "messages") from None
    check_length(text, service.tokenizer, info.max_model_len, "messages")
    # Special tokens are the template's to write.
    return await service.tokenizer.encode(text, add_special_tokens=False)

"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request, Response

from engine.types import EngineInfo, GenerationRequest
from server.engine_port import Engine
from server.generation import Choice
from server.metrics import RequestMeter
from server.openapi import GENERATION_ERRORS, operation
from server.protocol.common import read_body
from server.protocol.completions import CompletionRequest
from server.protocol.responses import CompletionResponse
from server.rendering.completions import CompletionRenderer, EchoedPrompt
from server.routes import service_of
from server.sampling import check_length, check_prompt, fit, for_choice, sampling_of
from server.service import Service
from server.stream import Answer, Job, respond
from server.text.pieces import PieceBuilder
from server.text.tokenizer import TextTokenizer

DEFAULT_MAX_TOKENS = 16

router = APIRouter(tags=["generation"])


_EXAMPLE = {
    "prompt": "Question: What is the alpha-3 code of Liberia?\nAnswer:",
    "max_tokens": 40,
    "temperature": 0,
    "collaboration": {"report": True},
}


@router.post(
    "/v1/completions",
    **operation(CompletionRequest, CompletionResponse, GENERATION_ERRORS, stream=True, example=_EXAMPLE),
)
async def create_completion(request: Request) -> Response:
    """Continue one or more prompts.

    With ``stream`` the response is a series of server-sent events, ``data: {...}``, ended by ``data: [DONE]``.
    """
    service = service_of(request)
    started = time.perf_counter()
    body = await read_body(request, CompletionRequest)
    member = service.models.member(body.model)
    engine = service.ready_engine()
    job = Job(
        engine=engine,
        meter=service.metrics.model(body.model),
        places=len(body.prompts) * body.candidates,
        places_param="n" if len(body.prompts) <= service.admission.capacity else "prompt",
        prepare=lambda: _prepare(service, engine, body, member, started),
        stream=bool(body.stream),
    )
    return await respond(request, service, job)


async def _prepare(
    service: Service, engine: Engine, body: CompletionRequest, member: int | None, started: float
) -> Answer:
    info = engine.info
    collaboration = service.models.collaboration(member, body.collaboration, info)
    ranked = body.candidates > (body.n or 1)
    sampling = sampling_of(
        body,
        info,
        # Ranking needs the written tokens' own logprobs.
        logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    prompts = await _prompt_ids(service, body, info)
    limits = [
        fit(len(prompt), body.max_tokens or None, DEFAULT_MAX_TOKENS, info.max_model_len, "prompt", "max_tokens")
        for prompt in prompts
    ]
    response_id = f"cmpl-{uuid.uuid4().hex}"
    echo_only = body.max_tokens == 0
    meter = service.metrics.model(body.model)
    choices: list[Choice] = []
    for prompt_index, prompt in enumerate(prompts):
        for candidate in range(body.candidates):
            request = GenerationRequest(
                f"{response_id}-{len(choices)}",
                prompt,
                for_choice(sampling, candidate, 1 if echo_only else limits[prompt_index]),
                collaboration,
            )
            choices.append(
                Choice(
                    index=len(choices),
                    prompt_index=prompt_index,
                    request=None if echo_only and body.logprobs is None else request,
                    prompt_only=echo_only,
                    builder=PieceBuilder(
                        service.tokenizer.detokenizer(),
                        stop=body.stop_strings,
                        include_stop=bool(body.include_stop_str_in_output),
                        min_tokens=body.min_tokens or 0,
                    ),
                    meter=RequestMeter(meter, joint=member is None, started=started),
                    refusal_param=body.grammar_param,
                )
            )
    renderer = CompletionRenderer(
        body,
        service.tokenizer,
        service.models.lane_names,
        prompt_ids=prompts,
        prompts=_echoed(service.tokenizer, body, prompts) if body.echo else None,
        response_id=response_id,
        created=int(time.time()),
        fingerprint=service.fingerprint,
    )
    return Answer(
        choices,
        renderer,
        sum(map(len, prompts)),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
    )


async def _prompt_ids(service: Service, body: CompletionRequest, info: EngineInfo) -> list[list[int]]:
    prompts = body.prompts
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text in texts:
        check_length(text, service.tokenizer, info.max_model_len, "prompt")
    ids = await service.tokenizer.encode_all(texts) if texts else [p for p in prompts if not isinstance(p, str)]
    for prompt in ids:
        check_prompt(prompt, info.vocab_size, "prompt")
    return ids


def _echoed(tokenizer: TextTokenizer, body: CompletionRequest, prompts: list[list[int]]) -> list[EchoedPrompt]:
    echoed = []
    for given, tokens in zip(body.prompts, prompts, strict=True):
        detokenizer = tokenizer.detokenizer()
        texts = [detokenizer.push(token) for token in tokens]
        texts[-1] += detokenizer.flush()
        echoed.append(EchoedPrompt(given if isinstance(given, str) else "".join(texts), tokens, texts))
    return echoed

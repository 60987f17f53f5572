"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from server.openapi import BODY_ERRORS, operation
from server.protocol.common import read_body
from server.protocol.responses import DetokenizeResponse, TokenizeResponse, encode
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from server.routes import service_of
from server.sampling import check_prompt
from server.service import Service

router = APIRouter(tags=["tokens"])


@router.post(
    "/tokenize",
    **operation(TokenizeRequest, TokenizeResponse, (*BODY_ERRORS, 503), example={"prompt": "Hello there!"}),
)
async def tokenize(request: Request) -> Response:
    """Text to token ids."""
    service = service_of(request)
    body = await read_body(request, TokenizeRequest)
    _check_model(service, body.model)
    info = service.ready_engine().info
    tokens = await service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    response = TokenizeResponse(len(tokens), info.max_model_len, tokens)
    if body.return_token_strs:
        response.token_strs = [service.tokenizer.token_text(token) for token in tokens]
    return Response(encode(response), media_type="application/json")


@router.post(
    "/detokenize",
    **operation(DetokenizeRequest, DetokenizeResponse, (*BODY_ERRORS, 503), example={"tokens": [40, 41, 42]}),
)
async def detokenize(request: Request) -> Response:
    """Token ids to text; special tokens are skipped."""
    service = service_of(request)
    body = await read_body(request, DetokenizeRequest)
    _check_model(service, body.model)
    info = service.ready_engine().info
    if body.tokens:
        check_prompt(body.tokens, info.vocab_size, "tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens)
    return Response(encode(DetokenizeResponse(text)), media_type="application/json")


def _check_model(service: Service, name: str | None) -> None:
    if name is not None:
        service.models.member(name)

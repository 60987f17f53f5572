"""POST /tokenize and /detokenize.

They generate nothing, so they are not among the requests that the lanes' queue bounds. What they ask for is work all
the same: it has a queue and a thread of its own, so that no prompt waits behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response

from engine.types import BASE, EngineInfo
from server.auth import client_of
from server.disconnect import unless_gone
from server.openapi import BODY_ERRORS, operation
from server.prompts import check_prompt
from server.protocol.common import read_body
from server.protocol.responses import DetokenizeResponse, TokenizeResponse, encode
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from server.service import Service, service_of
from server.text.tokenizer import TextTokenizer

router = APIRouter(tags=["tokens"])


@router.post(
    "/tokenize",
    **operation(TokenizeRequest, TokenizeResponse, (*BODY_ERRORS, 429, 503), example={"prompt": "Hello there!"}),
)
async def tokenize(request: Request) -> Response:
    """Text to token ids."""
    service = service_of(request)
    body = await read_body(request, TokenizeRequest)
    info = service.ready_engine().info
    lane = _lane_of(service, body.model, info)
    tokenizer = service.text_of(lane).tokenizer
    return await _respond(request, service, lambda: _tokenized(tokenizer, body, info.lane_context(lane)))


@router.post(
    "/detokenize",
    **operation(DetokenizeRequest, DetokenizeResponse, (*BODY_ERRORS, 429, 503), example={"tokens": [40, 41, 42]}),
)
async def detokenize(request: Request) -> Response:
    """Token ids to text; special tokens are skipped."""
    service = service_of(request)
    body = await read_body(request, DetokenizeRequest)
    info = service.ready_engine().info
    lane = _lane_of(service, body.model, info)
    if body.tokens:
        check_prompt(body.tokens, info.lane_vocab_size(lane), "tokens")
    tokenizer = service.text_of(lane).tokenizer
    return await _respond(request, service, lambda: _detokenized(tokenizer, body))


async def _respond(request: Request, service: Service, work: Callable[[], Awaitable[bytes]]) -> Response:
    with service.tokenizing.reserve(client_of(request.scope), 1, "prompt"):
        return Response(await unless_gone(request.receive, work()), media_type="application/json")


async def _tokenized(tokenizer: TextTokenizer, body: TokenizeRequest, max_model_len: int) -> bytes:
    tokens = await tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False, aside=True)

    def rendered() -> bytes:
        response = TokenizeResponse(len(tokens), max_model_len, tokens)
        if body.return_token_strs:
            response.token_strs = list(map(tokenizer.token_text, tokens))
        return encode(response)

    return await tokenizer.run(rendered, aside=True)


async def _detokenized(tokenizer: TextTokenizer, body: DetokenizeRequest) -> bytes:
    return await tokenizer.run(lambda: encode(DetokenizeResponse(tokenizer.decode(body.tokens))), aside=True)


def _lane_of(service: Service, name: str | None, info: EngineInfo) -> int:
    """The lane whose tokens are meant: a member's that has a vocabulary of its own, else the base's.

    Raises:
        ApiError: 404, no such model.
    """
    member = None if name is None else service.models.member(name)
    return BASE if member is None or info.vocabularies == "same" else member

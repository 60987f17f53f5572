"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.types import EngineInfo
from server.admission import Places
from server.call import Call, read_call
from server.errors import invalid, shown
from server.openapi import GENERATION_ERRORS, operation
from server.prompts import check_prompt, fit, prompt_tokens
from server.protocol.chat import ChatRequest
from server.protocol.responses import ChatResponse
from server.rendering.chat import ChatRenderer
from server.sampling import bad_words_of, for_choice, sampling_of
from server.serve import Prepared, serve
from server.service import Service
from server.text.chat_template import ChatTemplate, ChatTemplateError
from server.text.guard import GuardError

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
    call = await read_call(request, ChatRequest, "chatcmpl")
    return await serve(call, call.body.n or 1, "n", _prepare)


async def _prepare(call: Call[ChatRequest], places: Places) -> Prepared:
    service, body, info = call.service, call.body, call.info
    collaboration = await call.with_prompts(call.collaboration(), special=False)
    others = [len(own) for _, own in collaboration.prompts]
    sampling = sampling_of(
        body,
        info,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        bad_words=await bad_words_of(body, service.tokenizer),
    )
    prompt = await _prompt_ids(service, body, info)
    check_prompt(prompt, info.vocab_size, "messages")
    longest = max(len(prompt), *others, 0)
    limit = fit(longest, body.limit, None, info.max_model_len, "messages", body.limit_name, body.min_tokens)
    choices = []
    scores = call.scores_jointly(sampling)
    for index in range(body.n or 1):
        generation = call.generation(index, prompt, for_choice(sampling, index, limit), collaboration)
        choices.append(call.choice(index, prompt, generation, places, scores=scores))
    renderer = ChatRenderer(body, service.tokenizer, service.models.lane_names, head=call.head(), prompt_ids=prompt)
    return Prepared(choices, renderer, len(prompt))


async def _prompt_ids(service: Service, body: ChatRequest, info: EngineInfo) -> list[int]:
    template = service.chat_template
    if template is None:
        raise invalid("The served tokenizer has no chat template; use /v1/completions.", "messages", "no_chat_template")
    try:
        text, encode = await asyncio.to_thread(_rendered, service, template, body)
    except (ChatTemplateError, GuardError) as error:
        raise invalid(f"The chat template refuses these messages: {shown(str(error), 200)}.", "messages") from None
    # Special tokens at the beginning and the end are the template's to write.
    return await prompt_tokens(text, service.tokenizer, body, info, "messages", special=False, encode=encode)


def _rendered(
    service: Service, template: ChatTemplate, body: ChatRequest
) -> tuple[str, Callable[[str], list[int]] | None]:
    """The conversation as the template writes it, and what makes tokens of it if that is not the tokenizer alone."""
    messages: list[dict[str, Any]] = [message.for_template() for message in body.messages]
    given: dict[str, Any] = {"documents": body.documents, "variables": body.chat_template_kwargs}
    guard, encode = service.guard, None
    if guard is not None:
        # Special tokens in whatever the client sent are text.
        guarded = guard.guard([*messages, given])
        *messages, given = guarded.messages
        encode = partial(guard.encode, guarded)
    text = template.render(
        messages,
        add_generation_prompt=body.adds_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        **given,
    )
    return text, encode

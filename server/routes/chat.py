"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.spelling.guard import GuardError, SpecialTokenGuard
from engine.types import BASE
from server.admission import Places
from server.call import Call, read_call
from server.errors import invalid, shown
from server.openapi import GENERATION_ERRORS, operation
from server.prompts import prompt_tokens
from server.protocol.chat import ChatRequest
from server.protocol.responses import ChatResponse
from server.rendering.chat import ChatRenderer
from server.sampling import bad_words_of, for_choice, sampling_of
from server.serve import Prepared, serve
from server.strategies import check_fields
from server.text.chat_template import ChatTemplate, ChatTemplateError

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
    """Answer a conversation, by the chat template of the base model's tokenizer; where members have vocabularies of
    their own, each reads it by its own template.

    With ``stream`` the response is a series of server-sent events, ``data: {...}``, ended by ``data: [DONE]``.
    """
    call = await read_call(request, ChatRequest, "chatcmpl")
    return await serve(call, call.body.n or 1, "n", _prepare)


async def _prepare(call: Call[ChatRequest], places: Places) -> Prepared:
    service, body, info = call.service, call.body, call.info
    collaboration = call.collaboration()
    check_fields(body, collaboration, info)
    own = await call.own_prompts(collaboration, special=False)
    tokenizer = call.text_of(call.lane).tokenizer
    sampling = sampling_of(
        body,
        info,
        call.lane,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        bad_words=await bad_words_of(body, tokenizer),
    )
    prompt = await _prompt_ids(call, call.conversation_lane)
    for lane in (*call.others(collaboration), *call.other_templates(collaboration)):
        if lane not in own:
            own[lane] = await _prompt_ids(call, lane)
    collaboration = msgspec.structs.replace(collaboration, prompts=tuple(own.items()))
    lengths = {call.lane: len(prompt)} | {lane: len(ids) for lane, ids in own.items()}
    limit = call.limit(lengths, body.limit, None, "messages", body.limit_name)
    choices = []
    scores = call.scores_jointly(sampling)
    for index in range(body.n or 1):
        generation = call.generation(index, prompt, for_choice(sampling, index, limit), collaboration)
        choices.append(call.choice(index, prompt, generation, places, scores=scores))
    renderer = ChatRenderer(
        body,
        tokenizer,
        service.models.lane_names,
        head=call.head(),
        prompt_ids=prompt,
        check_below=service.settings.server.check_below,
    )
    return Prepared(choices, renderer, len(prompt))


async def _prompt_ids(call: Call[ChatRequest], lane: int) -> list[int]:
    """The conversation in a lane's tokens, by its own template."""
    text_of = call.text_of(lane)
    template = text_of.chat_template
    several = call.info.vocabularies == "spelled" or lane != BASE
    named = f" of '{call.info.lanes[lane].name}'" if several else ""
    if template is None:
        raise invalid(
            f"The served tokenizer{named} has no chat template; use /v1/completions.", "messages", "no_chat_template"
        )
    try:
        text, encode = await asyncio.to_thread(_rendered, text_of.guard, template, call.body)
    except (ChatTemplateError, GuardError) as error:
        reason = shown(str(error), 200)
        raise invalid(f"The chat template{named} refuses these messages: {reason}.", "messages") from None
    # Special tokens at the beginning and the end are the template's to write.
    ids = await prompt_tokens(
        text, text_of.tokenizer, call.body, call.context(lane), "messages", special=False, encode=encode
    )
    call.check_prompt(ids, lane, "messages")
    return ids


def _rendered(
    guard: SpecialTokenGuard | None, template: ChatTemplate, body: ChatRequest
) -> tuple[str, Callable[[str], list[int]] | None]:
    """The conversation as the template writes it, and what makes tokens of it if that is not the tokenizer alone."""
    messages: list[dict[str, Any]] = [message.for_template() for message in body.messages]
    given: dict[str, Any] = {"documents": body.documents, "variables": body.chat_template_kwargs}
    encode = None
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

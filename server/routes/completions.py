"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response

from engine.types import Collaboration
from server.admission import Places
from server.call import Call, read_call
from server.choice import Choice
from server.openapi import GENERATION_ERRORS, operation
from server.prompts import kept_tokens, prompt_tokens, truncated
from server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from server.protocol.responses import CompletionResponse
from server.rendering.completions import CompletionRenderer
from server.sampling import bad_words_of, for_choice, sampling_of
from server.serve import Prepared, serve
from server.strategies import check_fields
from server.text.echo import EchoedPrompt, echoed
from server.text.tokenizer import TextTokenizer

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
    call = await read_call(request, CompletionRequest, "cmpl")
    prompts = len(call.body.prompts)
    param = "n" if prompts <= call.service.admission.capacity else "prompt"
    return await serve(call, prompts * call.body.candidates, param, _prepare)


async def _prepare(call: Call[CompletionRequest], places: Places) -> Prepared:
    service, body, info = call.service, call.body, call.info
    collaboration = call.collaboration()
    check_fields(body, collaboration, info)
    own = await call.own_prompts(collaboration, special=True)
    tokenizer = call.text_of(call.lane).tokenizer
    ranked = body.candidates > (body.n or 1)
    sampling = sampling_of(
        body,
        info,
        call.lane,
        # Ranking needs the written tokens' own logprobs.
        logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        prompt_logprobs=_prompt_logprobs(body),
        bad_words=await bad_words_of(body, tokenizer),
    )
    prompts = await _prompt_ids(call, call.lane)
    by_lane = {lane: await _prompt_ids(call, lane) for lane in call.others(collaboration) if lane not in own}
    asked = body.max_tokens or None
    shared: list[Collaboration] = []
    limits = []
    for index, prompt in enumerate(prompts):
        others = own | {lane: ids[index] for lane, ids in by_lane.items()}
        lengths = {call.lane: len(prompt)} | {lane: len(ids) for lane, ids in others.items()}
        limits.append(call.limit(lengths, asked, DEFAULT_MAX_TOKENS, "prompt", "max_tokens"))
        shared.append(msgspec.structs.replace(collaboration, prompts=tuple(others.items())))
    echo_only = body.max_tokens == 0
    scores = call.scores_jointly(sampling)
    choices: list[Choice] = []
    for prompt_index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        for candidate in range(body.candidates):
            index = len(choices)
            generation = None
            if not echo_only or sampling.prompt_logprobs is not None:
                # The engine writes one token at least, also where only the prompt's logprobs are wanted.
                parameters = for_choice(sampling, candidate, 1 if echo_only else limit)
                generation = call.generation(index, prompt, parameters, shared[prompt_index])
            choices.append(
                call.choice(
                    index,
                    prompt,
                    generation,
                    places,
                    prompt_index=prompt_index,
                    prompt_only=echo_only,
                    scores=scores,
                )
            )
    renderer = CompletionRenderer(
        body,
        tokenizer,
        service.models.lane_names,
        head=call.head(),
        prompt_ids=prompts,
        prompts=await _echoed(tokenizer, body, prompts) if body.echo else None,
        check_below=service.settings.server.check_below,
    )
    return Prepared(choices, renderer, sum(map(len, prompts)))


async def _prompt_ids(call: Call[CompletionRequest], lane: int) -> list[list[int]]:
    """The prompts in a lane's tokens."""
    body, context, tokenizer = call.body, call.context(lane), call.text_of(lane).tokenizer
    keep = kept_tokens(body, context)

    async def tokens_of(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await prompt_tokens(prompt, tokenizer, body, context, "prompt", special=True)
        call.check_prompt(prompt, lane, "prompt")
        return prompt if keep is None else truncated(prompt, keep, body.truncation_side)

    ids = list(await asyncio.gather(*map(tokens_of, body.prompts)))
    for prompt in ids:
        call.check_prompt(prompt, lane, "prompt")
    return ids


def _prompt_logprobs(body: CompletionRequest) -> int | None:
    """How many of the most probable tokens are wanted at the prompt's positions; None is no logprobs at all."""
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((count for count in asked if count is not None), default=None)


async def _echoed(tokenizer: TextTokenizer, body: CompletionRequest, prompts: list[list[int]]) -> list[EchoedPrompt]:
    # A prompt that was cut is echoed as what was kept of it.
    given: Sequence[str | list[int]] = body.prompts if body.truncate_prompt_tokens is None else prompts

    def work() -> list[EchoedPrompt]:
        return [echoed(tokenizer, prompt, tokens) for prompt, tokens in zip(given, prompts, strict=True)]

    return await tokenizer.run(work)

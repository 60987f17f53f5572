"""A request to generate, from its body on; and what its choices are made of."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from fastapi import Request

from engine.types import BASE, Collaboration, EngineInfo, GenerationRequest, SamplingSpec
from server.access import Account
from server.admission import Places
from server.auth import client_of
from server.choice import Choice, ChoiceObserver, RequestObserver
from server.engine_port import Engine
from server.errors import invalid
from server.meters import ModelMeter, RequestMeter
from server.prompts import check_prompt, fit, prompt_tokens
from server.protocol.common import GenerationFields, read_body
from server.rendering.common import Head
from server.service import Service, service_of
from server.text.detokenize import ByteDetokenizer
from server.text.lane_text import LaneText
from server.text.pieces import PieceBuilder

Body = TypeVar("Body", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class Call(Generic[Body]):
    """A request to generate, on its way from its body to its answer.

    Attributes:
        member: number of the lane that is asked for alone; None for the joint model.
        client: the client that sent it, see :func:`server.auth.client_of`.
        started: when it came, by ``time.perf_counter``.
        id: unique; the engine's ids of its choices begin with it.
        observer: is told of its choices; None where it is not traced.
        account: is told what the answer takes, for the access log.
    """

    request: Request
    service: Service
    engine: Engine
    body: Body
    member: int | None
    client: str
    started: float
    id: str
    observer: RequestObserver | None
    account: Account

    @property
    def info(self) -> EngineInfo:
        """The running engine."""
        return self.engine.info

    @property
    def meter(self) -> ModelMeter:
        """The metrics of the model that was asked for."""
        return self.service.metrics.model(self.body.model)

    @property
    def response_id(self) -> str:
        """What the response calls itself: with the client's ``request_id`` if it gave one."""
        given = self.body.request_id
        return self.id if given is None else f"{self.id.partition('-')[0]}-{given}"

    def collaboration(self) -> Collaboration:
        """Who may write.

        Raises:
            ApiError: 400, naming the field.
        """
        return self.service.models.collaboration(self.body.model, self.body.collaboration, self.info)

    @property
    def lane(self) -> int:
        """The lane whose tokens the request's own prompt is in: a member's alone that has a vocabulary of its own, else
        the base's.
        """
        alone = self.member is not None and self.info.vocabularies == "spelled"
        return self.member if alone and self.member is not None else BASE

    @property
    def conversation_lane(self) -> int:
        """The lane by whose chat template the request's own prompt is written: a member's alone, where it has one."""
        member = self.member
        return self.lane if member is None or self.text_of(member).chat_template is None else member

    def other_templates(self, collaboration: Collaboration) -> list[int]:
        """Experts of the base's vocabulary that read a conversation by a chat template of their own."""
        if self.member is not None or self.info.vocabularies == "spelled":
            return []
        base = self.text_of(BASE).chat_template
        experts = range(1, len(self.info.lanes)) if collaboration.experts is None else collaboration.experts
        templates = {lane: self.text_of(lane).chat_template for lane in experts}
        return [lane for lane, template in templates.items() if template is not None and template is not base]

    def text_of(self, lane: int) -> LaneText:
        """How a lane reads and writes text."""
        return self.service.text_of(lane)

    def context(self, lane: int) -> int:
        """Most tokens of a lane's prompt and text together. The base under negative prompts has the base's."""
        return self.info.lane_context(lane if lane < len(self.info.lanes) else BASE)

    def others(self, collaboration: Collaboration) -> list[int]:
        """Lanes that need the request's prompt in tokens of their own, beside :attr:`lane`."""
        if self.member is not None or self.info.vocabularies == "same":
            return []
        lanes = [lane for lane, _ in collaboration.weights] or range(len(self.info.lanes))
        return [lane for lane in lanes if lane != BASE]

    async def own_prompts(self, collaboration: Collaboration, *, special: bool) -> dict[int, list[int]]:
        """By lane, the prompts of members that are given others than the request's.

        Args:
            special: see :func:`~server.prompts.prompt_tokens`.

        Raises:
            ApiError: 400, naming the field.
        """
        texts = self.service.models.prompts(self.body.model, self.body.collaboration, collaboration, self.info)
        found = {}
        for lane, (param, text) in texts.items():
            tokenizer = self.text_of(lane).tokenizer
            ids = await prompt_tokens(text, tokenizer, self.body, self.context(lane), param, special=special)
            self.check_prompt(ids, lane, param)
            found[lane] = ids
        return found

    def check_prompt(self, ids: list[int], lane: int, param: str) -> None:
        """See :func:`~server.prompts.check_prompt`."""
        check_prompt(ids, self.info.lane_vocab_size(lane if lane < len(self.info.lanes) else BASE), param)

    def limit(
        self, lengths: Mapping[int, int], max_tokens: int | None, default: int | None, param: str, name: str
    ) -> int:
        """How many tokens may be written after prompts of some lengths, by lane; see :func:`~server.prompts.fit`."""
        lane = min(lengths, key=lambda lane: self.context(lane) - lengths[lane])
        return fit(lengths[lane], max_tokens, default, self.context(lane), param, name, self.body.min_tokens)

    def generation(
        self, index: int, prompt: list[int], sampling: SamplingSpec, collaboration: Collaboration
    ) -> GenerationRequest:
        """What the engine is asked for choice ``index``."""
        return GenerationRequest(
            f"{self.id}-{index}",
            prompt,
            sampling,
            collaboration,
            timeline=self.observer is not None,
            client=self.client,
        )

    def scores_jointly(self, sampling: SamplingSpec) -> bool:
        """Whether the prompt's log-probabilities are to be the joint model's.

        Raises:
            ApiError: 400, the request says whose they are to be, and asks for none.
        """
        options = self.body.collaboration
        if options is None or options.score is None:
            joint = self.service.settings.server.prompt_scores == "joint"
            return joint and self.member is None and sampling.prompt_logprobs is not None
        if sampling.prompt_logprobs is None:
            raise invalid(
                "'collaboration.score' says whose log-probabilities of the prompt are returned; none are asked for: "
                "use 'prompt_logprobs', or 'echo' with 'logprobs'.",
                "collaboration.score",
            )
        return options.score == "joint"

    def choice(
        self,
        index: int,
        prompt: list[int],
        generation: GenerationRequest | None,
        places: Places,
        *,
        prompt_index: int = 0,
        prompt_only: bool = False,
        scores: bool = False,
    ) -> Choice:
        """A choice that nothing has been written of; see :class:`~server.choice.Choice`.

        Args:
            scores: the prompt's log-probabilities are the joint model's.
        """
        scoring = None
        if scores and generation is not None:
            asked = generation.sampling
            generation = msgspec.structs.replace(
                generation, sampling=msgspec.structs.replace(asked, prompt_logprobs=None)
            )
            # Before the first token there is nothing that could predict it.
            if len(prompt) > 1:
                alone = SamplingSpec(
                    seed=asked.seed, cache_salt=asked.cache_salt, prompt_logprobs=asked.prompt_logprobs
                )
                scoring = msgspec.structs.replace(
                    generation, request_id=f"{generation.request_id}-score", sampling=alone, scores=True
                )
            if prompt_only:
                generation, scoring = scoring, None
        body = self.body
        by_characters = generation is not None and generation.collaboration.strategy == "characters"
        tokenizer = self.text_of(self.lane).tokenizer
        observers: list[ChoiceObserver] = [places]
        if self.observer is not None:
            if index == 0 and generation is not None:
                self.observer.described(self.response_id, generation, self.info)
            observers.append(self.observer.choice(index, prompt_index, generation))
        return Choice(
            index=index,
            prompt_index=prompt_index,
            request=generation,
            prompt_only=prompt_only,
            builder=PieceBuilder(
                (
                    ByteDetokenizer()
                    if by_characters
                    else tokenizer.detokenizer(prompt, skip_special_tokens=body.skip_special_tokens is not False)
                ),
                stop=body.stop_strings,
                include_stop=bool(body.include_stop_str_in_output),
                min_tokens=body.min_tokens or 0,
            ),
            meter=RequestMeter(
                self.meter,
                joint=self.member is None and not by_characters,
                started=self.started,
                prompt_tokens=len(prompt),
            ),
            observers=observers,
            grammar_param=body.grammar_param,
            scoring=scoring,
        )

    def head(self) -> Head:
        """What each chunk and the response begin with."""
        return Head(self.response_id, int(time.time()), self.body.model, self.service.fingerprint)


async def read_call(request: Request, body_type: type[Body], id_prefix: str) -> Call[Body]:
    """Read a request to generate.

    Raises:
        ApiError: its body is not valid, its model unknown, or the engine not ready.
        ClientGone: the client hung up while it was sending.
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
    request.scope["account"] = account = Account(body.model)
    return Call(
        request,
        service,
        service.ready_engine(),
        body,
        member,
        client_of(request.scope),
        started,
        f"{id_prefix}-{uuid.uuid4().hex}",
        request.scope.get("trace"),
        account,
    )

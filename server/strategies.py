"""What requests may ask of the strategy that writes them, by the names of their fields."""

from __future__ import annotations

from collections.abc import Iterator

from engine.strategies.characters.requests import members
from engine.types import BASE, AverageName, Collaboration, EngineInfo, StrategyName
from server.errors import invalid, shown
from server.protocol.common import CollaborationOptions, GenerationFields
from server.protocol.completions import CompletionRequest

_OF_DEFERRAL = (
    "policy", "threshold", "share", "cost", "rate", "max_expert_tokens", "experts", "run_ahead", "blend", "alpha",
    "beta", "gamma", "negative_prompt", "veto", "regret",
)  # fmt: skip
_OF_CHARACTERS = ("weights", "average")


def strategy_of(options: CollaborationOptions, info: EngineInfo) -> StrategyName:
    """The strategy that writes a request for the joint model.

    Raises:
        ApiError: 400, it is not served, or a field is another one's.
    """
    served = info.strategies
    param = "collaboration.strategy"
    strategy = options.strategy or served[0]
    if strategy not in served:
        raise invalid(f"'{param}' may be {' or '.join(map(repr, served))} here, not {strategy!r}.", param)
    others = _OF_DEFERRAL if strategy == "characters" else _OF_CHARACTERS
    for field in others:
        if getattr(options, field) is not None:
            own = "deferral" if strategy == "characters" else "characters"
            raise invalid(
                f"'collaboration.{field}' is for the strategy {own!r}, and this request is for {strategy!r}.",
                f"collaboration.{field}",
            )
    return strategy


def characters(options: CollaborationOptions, lane_names: tuple[str, ...]) -> Collaboration:
    """What the engine is told where members write by characters.

    Raises:
        ApiError: 400, naming the field.
    """
    param = "collaboration.weights"
    numbers = {name: number for number, name in enumerate(lane_names)}
    for name in options.weights or ():
        if name not in numbers:
            raise invalid(f"'{param}': there is no member {shown(name)}; there are: {', '.join(numbers)}.", param)
    weights = tuple((numbers[name], weight) for name, weight in (options.weights or {}).items())
    try:
        members(weights, len(lane_names))
    except ValueError as error:
        raise invalid(f"'{param}': {error}.", param) from None
    average: AverageName = options.average or "mixture"
    return Collaboration(strategy="characters", weights=weights, average=average, looks=bool(options.report))


def check_fields(body: GenerationFields, collaboration: Collaboration, info: EngineInfo) -> None:
    """Refuse what the strategy of a request cannot do.

    Raises:
        ApiError: 400, naming the field.
    """
    spelled = info.vocabularies == "spelled"
    if (member := collaboration.member) is not None:
        if spelled and member != BASE and (param := body.grammar_param) is not None:
            name = info.lanes[member].name
            raise invalid(f"'{param}' is served in the base's vocabulary; {name} has one of its own.", param)
        return
    by_characters = collaboration.strategy == "characters"
    if not (spelled or by_characters):
        return
    reason = "which members that write by characters do not draw" if by_characters else "whose ids differ by member"
    for field in (*_of_tokens(body, spelled, by_characters), *(_of_token_sampling(body) if by_characters else ())):
        if field == "prompt":
            raise invalid("'prompt': token ids are another text to each member: send text, or ask one alone.", field)
        raise invalid(f"'{field}' is about tokens, {reason}: leave it out, or ask a member alone.", field)
    if collaboration.blend is not None:
        for field in _of_token_sampling(body):
            if field.endswith("_penalty"):
                raise invalid(
                    f"'{field}' is about tokens, and a union of different vocabularies writes strings.", field
                )


def _of_tokens(body: GenerationFields, spelled: bool, by_characters: bool) -> Iterator[str]:
    """Given fields that name token ids, or count tokens that members do not have in common.

    Deferral writes the base's tokens, so that those which say when a text ends, and what is returned, are the base's.
    """
    fields = ["logit_bias", "allowed_token_ids", "bad_words"]
    if by_characters:
        fields += ["stop_token_ids", "return_token_ids", "return_tokens_as_token_ids"]
    for field in fields:
        if getattr(body, field):
            yield field
    if by_characters and body.prompt_logprobs is not None:
        yield "prompt_logprobs"
    logprobs = getattr(body, "logprobs", None)
    if logprobs is not None and logprobs is not False:
        yield "logprobs"
    if body.grammar_param is not None:
        yield body.grammar_param
    if isinstance(body, CompletionRequest):
        if body.candidates > (body.n or 1):
            yield "best_of"
        if spelled and any(not isinstance(prompt, str) for prompt in body.prompts):
            yield "prompt"
    if spelled and body.truncate_prompt_tokens is not None:
        yield "truncate_prompt_tokens"


def _of_token_sampling(body: GenerationFields) -> Iterator[str]:
    """Given fields that change how tokens are drawn."""
    nothing = {"top_p": 1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
    for field, neutral in nothing.items():
        if getattr(body, field) not in (None, neutral):
            yield field
    if (body.top_k or 0) > 0:
        yield "top_k"

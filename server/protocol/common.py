"""What completions and chat have in common: sampling fields, the ``collaboration`` object, streaming options."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from fastapi import Request
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator
from starlette.requests import ClientDisconnect

from engine.blends import GREATEST_TOP, GREATEST_WEIGHT, BlendKind
from engine.spelling.named import Score
from engine.types import MOST_DRAFTS, AverageName, PolicyName, StrategyName, StructuredOutputs
from server.disconnect import ClientGone
from server.errors import VARIANTS, ApiError, FieldError, from_validation
from server.protocol.base import ModelName, Only, Strict, TokenId, Unsupported
from server.protocol.structured import MAX_GRAMMAR_LENGTH, ResponseFormat, StructuredOutputsOptions, engine_grammar

MAX_STOP_LENGTH = 1024
"""Characters of a stop string."""

MAX_STOP_STRINGS = 256
"""Greatest number of stop strings that ``server.max_stop_strings`` may allow."""

MAX_TOKEN_IDS = 4096
"""Token ids in a list that a request adds to sampling."""

MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 256
MAX_LOGPROBS = 20
"""Most probable tokens per position, as in vLLM's default."""

MAX_METADATA = 16
MAX_EXPERTS = 64

MAX_PROMPT_LENGTH = 1 << 24
"""Characters of a member's own prompt; whether it fits the context is looked at later."""

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


Body = TypeVar("Body", bound=Strict)

Label = Annotated[str, Field(max_length=1024)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


NAMED, SPELLED_OUT = VARIANTS
PromptText = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
Weight = Annotated[float, Field(ge=-GREATEST_WEIGHT, le=GREATEST_WEIGHT)]


class BlendOptions(Strict):
    """A combination of the members' distributions. Members are "base" and the experts' names."""

    kind: BlendKind
    """"mixture": average of probabilities. "product": weighted sum of logits. "union": the average over the most
    probable tokens of each member."""

    weights: (
        Literal["gate"] | Annotated[dict[ModelName, Weight], Field(min_length=1, max_length=MAX_EXPERTS + 1)] | None
    ) = None
    """Weight of each member, or "gate" for a mixture by the gate's probabilities at each position. The weights of a
    mixture or union sum to 1. Default: equal weights; a product needs some."""

    anchor: ModelName | None = None
    """Products: the member that says what is plausible."""

    plausibility: float | None = Field(default=None, gt=0, le=1)
    """Products: tokens less probable than this share of the anchor's most probable one are ruled out."""

    top: int | None = Field(default=None, ge=1, le=GREATEST_TOP)
    """Unions: how many of each member's most probable tokens may be written. Default: 10."""

    score: Score | None = None
    """Unions where vocabularies differ: what a member gives to a string that is none of its tokens. "mass": what all
    its tokens have together that begin with it. "first": what it gives to the first token of its spelling, as
    published. Default: "mass"."""

    align: bool | None = None
    """Unions where vocabularies differ: ask experts only where all of them have a token boundary. Without, answers of
    more than a few tokens suffer. Default: true."""


class CollaborationOptions(Strict):
    """Who may write, and how it is decided. Where a member alone is asked for, only ``report`` may be given."""

    policy: PolicyName | None = None
    """Turns the gate's value into a decision. Default: the gate's, usually "threshold"."""

    threshold: float | None = Field(default=None, ge=0, le=1)
    """A token is deferred when its deferral probability is greater. Default: the gate's."""

    share: float | None = Field(default=None, ge=0, le=1)
    """In the place of ``threshold``: the share of the tokens that experts should write on average, by the curve of the
    gate's calibration."""

    cost: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """In the place of ``threshold``: seconds of the experts' steps per token of the answer that may be spent on
    average, by the curve of the gate's calibration, as measured where that was done."""

    rate: float | None = Field(default=None, ge=0, le=1)
    """Share of tokens that the "random" policy defers. Default: 0.5."""

    max_expert_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """After so many expert tokens the base writes alone. Default: no limit."""

    experts: Annotated[list[ModelName], Field(max_length=MAX_EXPERTS)] | None = None
    """Names of the experts that may write. Default: all."""

    run_ahead: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=MOST_DRAFTS)] | None = None
    """How many tokens the base drafts past a deferral before the expert has written: "auto", "off" or a number. Changes
    how fast an answer comes, never what it says. Default: the server's, usually "auto"."""

    blend: (
        Annotated[
            Annotated[str, Field(min_length=1, max_length=64), Tag(NAMED)] | Annotated[BlendOptions, Tag(SPELLED_OUT)],
            Discriminator(
                lambda value: (
                    NAMED if isinstance(value, str) else SPELLED_OUT if isinstance(value, dict | BlendOptions) else None
                ),
                custom_error_type="blend_type",
                custom_error_message="must be the name of a blend, or an object with a 'kind'",
            ),
        ]
        | None
    ) = None
    """What is written where the experts are asked: the name of a preset ("mixture", "union", "proxy", "contrastive",
    "cfg", or one of the server's own), or a combination of the members. Default: the expert's own token."""

    alpha: float | None = Field(default=None, ge=0, le=10)
    """Blend "proxy": how much of the experts' difference is added to the base; default 1. Blend "contrastive": tokens
    less probable than this share of the expert's most probable one are ruled out; default 0.1, at most 1."""

    beta: float | None = Field(default=None, ge=0, le=GREATEST_WEIGHT - 1)
    """Blend "contrastive": weight of the amateur. Default: 0.5."""

    gamma: float | None = Field(default=None, ge=0, le=GREATEST_WEIGHT)
    """Blend "cfg": how far from the negative prompt; 1 is the base alone. Default: 1.5."""

    negative_prompt: PromptText | None = None
    """Blend "cfg": the prompt whose answers are to be avoided, in the place of the request's."""

    strategy: StrategyName | None = None
    """How the members write together. "deferral": one of them writes each token, as the policy decides. "characters":
    all of them draw each byte from the average of their distributions (CharED), also where their vocabularies differ;
    ``max_tokens`` counts pieces, and at temperature 0 each byte is the most probable one. Default: the server's,
    usually "deferral"."""

    weights: (
        Annotated[dict[ModelName, Annotated[float, Field(ge=0, le=1)]], Field(min_length=1, max_length=MAX_EXPERTS + 1)]
        | None
    ) = None
    """Characters: weight of each member, sum 1; those that are not named do not take part. Default: equal weights."""

    average: AverageName | None = None
    """Characters: "mixture", the weighted mean of the members' probabilities, or "geometric", the weighted geometric
    mean on what all of them allow. Default: "mixture"."""

    prompts: Annotated[dict[ModelName, PromptText], Field(max_length=MAX_EXPERTS)] | None = None
    """Experts that get another prompt than the request's: a text by each one's name."""

    score: Literal["base", "joint"] | None = None
    """Whose log-probabilities of the prompt's tokens are returned, where they are asked for (``prompt_logprobs``, or
    ``echo`` with ``logprobs``): the base's, or those of what would be written after each of them: the gate's mixture of
    base and experts, what the policy chooses, or the blend. Default: "base"."""

    veto: float | None = Field(default=None, ge=0, le=1)
    """An expert whose top probability (at temperature 1, before penalties) is below this stands back: the base's own
    token is written. 0 is none. Not with a blend. Default: the server's, usually 0."""

    regret: float | None = Field(default=None, ge=0, le=1)
    """An expert's token that differs from the base's is taken back for it where the base, having read some tokens on,
    holds it for wrong with more than this probability. As long is the answer held back; nothing that was sent is ever
    taken back. Needs a pair that was trained for it. Not with a blend, nor with a given form. 1 is never. Default:
    the server's, usually 1."""

    report: bool | None = None
    """Return each token's text, source and deferral probability in ``choices[].collaboration``, how sure the models
    were of it, and whether it deserves a second look (``check``)."""


class StreamOptions(Strict):
    """Only with ``stream``."""

    include_usage: bool | None = None
    """Send a last chunk with empty ``choices`` and the usage of the whole request."""

    continuous_usage_stats: bool | None = None
    """Send the usage so far with every chunk."""

    include_obfuscation: Annotated[Any, Only((False,))] = None


class GenerationFields(Strict):
    """The fields that mean the same in completions and chat."""

    messages_by_field: ClassVar[dict[str, str]] = {
        "stop": f"must be a string or an array of strings, each with 1 to {MAX_STOP_LENGTH} characters",
        "metadata": f"must map at most {MAX_METADATA} names of 1 to 64 characters to strings of at most 512",
        "logit_bias": f"must map at most {MAX_TOKEN_IDS} token ids to numbers from -100 to 100",
        "run_ahead": f"must be 'auto', 'off', or an integer from 1 to {MOST_DRAFTS}",
        "json": f"must be a JSON schema: an object, true, or text of 1 to {MAX_GRAMMAR_LENGTH} characters",
        "schema": "must be a JSON schema: an object, or true",
        "blend.weights": f"must be 'gate', or map members to numbers from -{GREATEST_WEIGHT:g} to {GREATEST_WEIGHT:g}",
    }

    model: ModelName
    """The joint model's name, or NAME/base or NAME/EXPERT for a member alone."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    """0 is greedy. Default: 1."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus sampling. Default: 1."""

    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    """Sample among the k most probable tokens; 0 and -1 mean all. Default: 0."""

    min_p: float | None = Field(default=None, ge=0, le=1)
    """Drop tokens less probable than this share of the most probable one's. Default: 0."""

    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    """Makes the request reproducible, alone and in a batch. Choice i > 0 draws from a seed derived from this and i."""

    n: int | None = Field(default=None, ge=1, le=128)
    """Choices for each prompt. Default: 1."""

    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    """Strings that end the text; they may span tokens, of whatever source. How many there may be is the server's
    ``max_stop_strings``."""

    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)] | None = None
    """Tokens that end the text, beside the end-of-sequence tokens."""

    include_stop_str_in_output: bool | None = None
    """Leave the stop string in the text. Default: false."""

    ignore_eos: bool | None = None
    """Write on after an end-of-sequence token. Default: false."""

    min_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """Neither end-of-sequence nor stop tokens nor stop strings end the text before. Default: 0."""

    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Default: 0."""

    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Default: 0."""

    repetition_penalty: float | None = Field(default=None, gt=0)
    """1 is none. Default: 1."""

    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_TOKEN_IDS)] | None
    ) = None
    """Token id (as a string) to the value that is added to its logit."""

    stream: bool | None = None
    """Send server-sent events. Default: false."""

    stream_options: StreamOptions | None = None
    """Only with ``stream``."""

    return_token_ids: bool | None = None
    """Return the token ids of prompt and text."""

    return_tokens_as_token_ids: bool | None = None
    """Show tokens in logprobs as ``token_id:N`` instead of their text. Default: false."""

    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS)] | None = None
    """The only tokens that may be written, by whichever model."""

    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]], Field(max_length=MAX_BAD_WORDS)
        ]
        | None
    ) = None
    """Words that must not be written: the last token of a word's tokens is forbidden after the others."""

    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Return the logprobs of the prompt's tokens, and of so many of the most probable ones: the base's, or those of the
    joint model (``collaboration.score``). Not with ``stream``."""

    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default: true."""

    spaces_between_special_tokens: bool | None = None
    """May only be false where special tokens are skipped, which makes it meaningless. Default: true."""

    add_special_tokens: bool | None = None
    """Add the tokenizer's special tokens (a beginning of text) to the prompt. Default: true; in chat false, where they
    are the template's to write."""

    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    """Keep so many tokens of a longer prompt; -1 keeps as many as leave room for one more. Default: a prompt that is
    too long is refused."""

    truncation_side: Literal["left", "right"] | None = None
    """Where a prompt is cut: "left" keeps its end, "right" its beginning. Default: "left"."""

    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Share cached prefixes only with requests that have the same salt."""

    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    """Becomes part of the response's id. Default: a random one."""

    collaboration: CollaborationOptions | None = None
    """How the models share the work."""

    response_format: ResponseFormat | None = None
    """What the answer must look like, regardless of which model writes the token. Default: free text."""

    structured_outputs: StructuredOutputsOptions | None = None
    """A grammar for the answer, under vLLM's names; not together with ``response_format``."""

    user: Label | None = None
    """Accepted and ignored: a label for the client's own bookkeeping."""

    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] | None = None
    """Accepted and ignored."""

    prompt_cache_key: Label | None = None
    """Accepted and ignored."""

    safety_identifier: Label | None = None
    """Accepted and ignored."""

    session_id: Label | None = None
    """Accepted and ignored."""

    # OpenAI's fields that clients send by default.
    service_tier: Annotated[Any, Only(("auto", "default"))] = None
    store: Annotated[Any, Only((False,))] = None

    # vLLM's fields that clients send by default.
    use_beam_search: Annotated[Any, Only((False,))] = None
    length_penalty: Annotated[Any, Only((1, 1.0))] = None
    early_stopping: Annotated[Any, Only((False,))] = None
    priority: Annotated[Any, Only((0,))] = None
    watermarking: Annotated[Any, Only((False,))] = None
    thinking_token_budget: Annotated[Any, Only((-1,))] = None
    stream_interval: Annotated[Any, Only((1,))] = None
    routed_experts_prompt_start: Annotated[Any, Only((0,))] = None
    return_token_offsets: Annotated[Any, Only((False,))] = None
    return_mm_kwargs: Annotated[Any, Only((False, True))] = None
    mm_payload: Annotated[Any, Only(("tensors", "none"))] = None
    vllm_xargs: Annotated[Any, Only(({},))] = None
    kv_transfer_params: Unsupported = None
    ec_transfer_params: Unsupported = None
    logprob_token_ids: Unsupported = None
    repetition_detection: Unsupported = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "may only be given with stream")
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError("prompt_logprobs", "cannot be used with stream")
        if self.spaces_between_special_tokens is False and self.skip_special_tokens is False:
            raise FieldError("spaces_between_special_tokens", "must not be false where special tokens are shown")
        for field in ("allowed_token_ids", "bad_words"):
            if getattr(self, field) and self.grammar_param is not None:
                raise FieldError(field, f"cannot be used together with {str(self.grammar_param).partition('.')[0]}")
        if self.truncate_prompt_tokens == 0:
            raise FieldError("truncate_prompt_tokens", "must be -1, or at least 1")
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise FieldError("truncation_side", "may only be given with truncate_prompt_tokens")
        return self

    @model_validator(mode="after")
    def _check_grammar(self) -> Self:
        if self.response_format is not None and self.structured_outputs is not None:
            raise FieldError("structured_outputs", "cannot be used together with response_format")
        engine_grammar(self.response_format, self.structured_outputs)
        return self

    @property
    def grammar(self) -> StructuredOutputs | None:
        """The grammar that was asked for."""
        return engine_grammar(self.response_format, self.structured_outputs)

    @property
    def grammar_param(self) -> str | None:
        """The field that brought the grammar, e.g. ``structured_outputs.regex``."""
        if self.structured_outputs is not None:
            return f"structured_outputs.{self.structured_outputs.given}"
        if self.response_format is None:
            return None
        return "response_format" if self.response_format.schema_ is None else "response_format.json_schema.schema"

    @property
    def stop_strings(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """A usage chunk was asked for."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Usage with every chunk was asked for."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def report(self) -> bool:
        """Sources and deferral probabilities were asked for."""
        return bool(self.collaboration and self.collaboration.report)


async def read_body(request: Request, model: type[Body]) -> Body:
    """Parse a request's body.

    Raises:
        ApiError: 415 for another content type, 400 for anything that the model does not allow.
        ClientGone: the client hung up while it was sending.
    """
    # A program may leave the content type out. A page in a browser may not: what it sends without one goes to any
    # server that the browser reaches, one on its own machine without a key say, and CORS does not ask that one before.
    default = "" if "origin" in request.headers else "application/json"
    content_type = request.headers.get("content-type", default).partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(415, "The content type must be application/json.", code="unsupported_media_type")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    try:
        # Pydantic's own JSON parser bounds nesting and the length of numbers, and refuses bytes that are no UTF-8.
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise from_validation(problems, model.messages_by_field) from None

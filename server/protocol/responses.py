"""Responses and stream chunks, as msgspec structs: they are encoded for every token, in microseconds."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from engine.types import PolicyName, Relation, StrategyName

FinishReason = Literal["stop", "length"]


class CompletionTokensDetails(Struct):
    """Who wrote how much; sums to ``completion_tokens``. ``blended_tokens`` is left out where there are none.

    ``vetoed_tokens`` says for how many of the base's tokens an expert stood back, ``regretted_tokens`` for how many an
    expert's token was taken back; each is left out where for none.

    Of a text that was written by characters these are pieces, by the member that found each most probable, and
    ``text_bytes`` says how long they are together.
    """

    base_tokens: int
    expert_tokens: int
    blended_tokens: int | UnsetType = UNSET
    text_bytes: int | UnsetType = UNSET
    vetoed_tokens: int | UnsetType = UNSET
    regretted_tokens: int | UnsetType = UNSET


class PromptTokensDetails(Struct):
    """``cached_tokens``: prompt tokens that the base (a member served alone: that member) found in its prefix cache."""

    cached_tokens: int


class MemberUsage(Struct):
    """What a member did for a request.

    Attributes:
        tokens: it wrote.
        prompt_tokens: it computed of the prompts, once for each choice; what its prefix cache had is not in it.
        seconds: its steps took for this request: each step's time is divided by the positions that it computed.
    """

    tokens: int
    prompt_tokens: int
    seconds: float


class CollaborationUsage(Struct):
    """What each member did, by its name, and the longest time that a choice waited to be admitted to the lanes."""

    by_source: dict[str, MemberUsage]
    queue_seconds: float


class Usage(Struct):
    """Tokens of the whole request: each prompt once, every written token (all ``best_of`` candidates)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails
    prompt_tokens_details: PromptTokensDetails
    collaboration: CollaborationUsage


class WrittenPiece(Struct):
    """What one round of members that write by characters has written.

    Attributes:
        text: as in ``tokens``: "" where it ends amid a character.
        start: of its first byte in the answer.
        end: after its last byte.
        support: its log-probability with each member that has a token which begins like it.
        dropped: the others.
    """

    text: str
    start: int
    end: int
    support: dict[str, float]
    dropped: list[str]


class ReportedWord(Struct):
    """A word that an expert with a vocabulary of its own has written.

    Attributes:
        start: number of its first token, in this report's lists.
        length: in tokens. The last of them may be missing where the text was cut, and come with a later chunk.
        member: the expert.
        logprob: of the word, with that expert.
    """

    start: int
    length: int
    member: str
    logprob: float


class CollaborationReport(Struct):
    """Per token (or piece), on request: lists of equal length. ``tokens``, joined, are the text that was written.

    Attributes:
        sources: "base", an expert's name, or "blend"; of a piece the member that found it most probable.
        support: of a blended token its log-probability with each member that took part; null for other tokens. Left out
            where nothing was blended.
        pieces: where members write by characters.
        words: where experts with vocabularies of their own have written.
        base_confidences: the base's top probability at each position; null where it was not asked.
        expert_confidences: the expert's, whether its token was written or stood back; null where none was asked.
        agreed: whether the token of who was asked is the base's own; null where nobody was asked.
        check: whether a token deserves a second look: who wrote it was not sure, an expert stood back, or an expert's
            token was taken back.
        vetoed: whether an expert stood back; left out where none did.
        regretted: whether an expert's token was taken back for it; left out where none was.
    """

    tokens: list[str]
    sources: list[str]
    deferral_probabilities: list[float | None]
    support: list[dict[str, float] | None] | UnsetType = UNSET
    pieces: list[WrittenPiece] | UnsetType = UNSET
    words: list[ReportedWord] | UnsetType = UNSET
    base_confidences: list[float | None] | UnsetType = UNSET
    expert_confidences: list[float | None] | UnsetType = UNSET
    agreed: list[bool | None] | UnsetType = UNSET
    check: list[bool] | UnsetType = UNSET
    vetoed: list[bool] | UnsetType = UNSET
    regretted: list[bool] | UnsetType = UNSET


class LegacyLogprobs(Struct):
    """Logprobs of completions. Offsets count characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct):
    """One token at a position of a prompt, as in vLLM."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each token of a prompt: the logprobs of itself and of the most probable ones, by token id; null for the first."""


class CompletionChoice(Struct):
    """One choice, or what a chunk adds to it."""

    text: str
    index: int
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason | None
    collaboration: CollaborationReport | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionResponse(Struct):
    """Response of /v1/completions, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Struct):
    """One of the most probable tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct):
    """A written token, with the most probable ones beside it."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Logprobs of chat."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(Struct):
    """The assistant's answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Struct):
    """One choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    collaboration: CollaborationReport | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatResponse(Struct):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(Struct):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    """What a chunk adds to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    collaboration: CollaborationReport | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    """A chunk of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CurvePoint(Struct):
    """A point of a gate's calibration: ``cost`` in seconds of the experts' steps per token, left out if unknown."""

    threshold: float
    share: float
    cost: float | UnsetType = UNSET


class ServedRegret(Struct):
    """How experts' tokens are taken back: so many tokens are read before (``ahead``), the threshold that was chosen in
    training (1: never), and the ``default`` of ``collaboration.regret``.
    """

    ahead: int
    threshold: float
    default: float


class ServedCollaboration(Struct):
    """How the members of a joint model share the work unless a request says otherwise.

    ``policies`` are those that this pair can use (some need a gate), ``thresholds`` the default of each that has one.
    The first of ``strategies`` is the default. ``vocabularies`` are the "same", or "spelled": each member has its own.
    ``curve``: by rising threshold, the share of the tokens that experts wrote at it when the gate was calibrated; left
    out where that is not known. ``collaboration.share`` and ``collaboration.cost`` go by it. ``veto`` is the
    default of ``collaboration.veto``, left out where that is none. ``regret`` is left out where none was trained.
    """

    policy: PolicyName
    policies: list[PolicyName]
    thresholds: dict[PolicyName, float]
    gate: bool
    experts: list[str]
    blends: list[str]
    strategies: list[StrategyName]
    vocabularies: Relation
    curve: list[CurvePoint] | UnsetType = UNSET
    veto: float | UnsetType = UNSET
    regret: ServedRegret | UnsetType = UNSET


class ModelCard(Struct):
    """A served model. ``parent`` is the joint model of a member.

    A joint model's also says what ``collaboration`` is in force, whether there is a ``chat`` template, and the pair's
    own ``example_prompt``.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int | None
    collaboration: ServedCollaboration | UnsetType = UNSET
    chat: bool | UnsetType = UNSET
    example_prompt: str | UnsetType | None = UNSET


class ModelList(Struct):
    """Response of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(Struct):
    """Response of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct):
    """Response of /detokenize."""

    prompt: str


class HealthResponse(Struct):
    """Response of /health and /ready."""

    status: str


class VersionResponse(Struct):
    """Response of /version.

    Attributes:
        engine: versions of what the engine is made of.
        ends_of_text: token ids that end a text, whoever writes them: every member's own. Where vocabularies differ the
            base's.
        vocabularies: of the members: the "same", or "spelled", each its own.
    """

    version: str
    engine: dict[str, str]
    ends_of_text: list[int] = []
    vocabularies: Relation = "same"


encode = msgspec.json.Encoder().encode
"""Encodes any of these."""

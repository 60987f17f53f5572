"""The nouns of the engine, shared by scheduler, lanes, process and client.

All are msgspec structs, so that the very same objects travel between processes. Token ids everywhere, never text.
Lanes are numbered: 0 is the base, 1..K are the experts in the order of the configuration. That number is also the
*source* of a token.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

import msgspec

from engine.blends import Blend
from engine.hindsight import Hindsight

BASE = 0
"""The base lane's number, and the source of every token that the base writes."""

NEGATIVE = "negative"
"""Name of the lane that the base has for negative prompts, behind all members; see ``scheduler.guidance``."""

BLEND = -1
"""The source of a token that was drawn from a combination of members."""

NO_TOKEN = -1
"""The id of what is written where members have no tokens in common: a piece of text."""

RunAhead = Literal["auto", "off"] | int
MOST_DRAFTS = 64
"""Greatest number that run-ahead may be set to."""

Relation = Literal["same", "spelled"]
"""Of the members' vocabularies: one for all, or each its own, in which it spells the common text."""

StrategyName = Literal["deferral", "characters"]
AverageName = Literal["mixture", "geometric"]
PolicyName = Literal["threshold", "sample", "always", "never", "random", "confidence"]
FinishReason = Literal["stop", "length", "error", "aborted"]


class ErrorCode(Enum):
    """Why a request ended with an error."""

    INVALID_REQUEST = "invalid_request"
    """It cannot be served as it is; nothing was written."""
    INVALID_GRAMMAR = "invalid_grammar"
    """Its grammar cannot be followed, or not any further: its masks take too long."""
    STEP_TIMEOUT = "step_timeout"
    """A lane that it waited for did not come back from its step in time."""
    BAD_READING = "bad_reading"
    """A model's output is no usable number: a gate value, a probability, or a token id."""
    LANE_FAILURE = "lane_failure"
    """A lane could not go on with it."""


class StructuredOutputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """A grammar that the whole answer must follow, whoever writes it. Exactly one is set. Names are vLLM's.

    Attributes:
        json: a JSON schema, as text.
        json_object: any JSON object.
        regex: a regular expression.
        choice: one of these texts.
        grammar: an EBNF grammar.
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None


class SamplingSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn, in whichever lane draws it. Names and meanings are vLLM's.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps the whole vocabulary.
        seed: makes the request reproducible, alone and in any batch; None is another answer each time.
        logit_bias: token id -> added logit.
        allowed_token_ids: the only tokens that can be drawn; None is all.
        bad_words: token ids of words that must not be written, at least one per word: the last one cannot be drawn
            right after the others.
        cache_salt: cached prefixes are shared only with requests of the same salt.
        logprobs: how many of the most probable tokens to report beside each written one; None reports nothing.
        prompt_logprobs: the same for prompt tokens, by the base unless the request ``scores``; None reports nothing.
        max_tokens: most tokens to write; at least 1.
        min_tokens: end-of-sequence and stop tokens cannot be drawn before this many tokens are written.
        structured_outputs: a grammar; None is free text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    cache_salt: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    structured_outputs: StructuredOutputs | None = None


class Collaboration(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who may write, and how it is decided.

    Attributes:
        member: None for the joint model; a lane's number for that member alone, which never touches another lane.
        policy: turns the gate's value into a decision, see :mod:`engine.strategies.deferral.policies`; None is the
            gate's default.
        threshold: a token is deferred when its deferral probability is greater; None is the gate's default.
        rate: share of tokens that the ``random`` policy defers; other policies do not look at it.
        max_expert_tokens: after this many expert tokens the base writes alone; None is no limit.
        experts: lanes that may be deferred to; None is all of them.
        run_ahead: how many tokens the base may draft past a deferral before the expert has written: "auto" as many as
            pay, "off", or a number; None is the engine's default. What is written does not depend on it.
        blend: what is written where the experts are asked; None is the expert's own token.
        prompts: (lane, token ids) of members that have another prompt than the request's, which is the base's. Where
            vocabularies differ, each member that takes part has one, in its own tokens.
        strategy: how the members write together; None is the engine's default.
        weights: characters: (lane, weight) of the members, not negative, sum 1; empty is equal weights for all.
        average: characters: of the members' distributions.
        veto: an expert whose top probability is below this stands back: the base's own token is written. 0 is none;
            None is the engine's default.
        regret: an expert's token is taken back for the base's own where the base, having read on, regrets it more than
            this probability; answers are held back as long. 1 is never; None is the engine's default.
        looks: tell how sure the models were of each token, see :class:`Look`.
    """

    member: int | None = None
    policy: PolicyName | None = None
    threshold: float | None = None
    rate: float = 0.5
    max_expert_tokens: int | None = None
    experts: tuple[int, ...] | None = None
    run_ahead: RunAhead | None = None
    blend: Blend | None = None
    prompts: tuple[tuple[int, list[int]], ...] = ()
    strategy: StrategyName | None = None
    weights: tuple[tuple[int, float], ...] = ()
    average: AverageName = "mixture"
    veto: float | None = None
    looks: bool = False
    regret: float | None = None


class GenerationRequest(msgspec.Struct, frozen=True):
    """One prompt to be continued once. ``n`` completions of a prompt are n requests.

    Attributes:
        request_id: unique among the requests in flight.
        prompt: token ids, at least one.
        scores: nothing is written: ``sampling.prompt_logprobs`` are the joint model's, see
            :mod:`engine.strategies.scoring`, and the request ends with them.
        score_from: with ``scores``: number of the first token that is scored. What is before it is a prompt, of which
            a prefix cache may know.
        timeline: the last delta tells when the request was where, for tracing.
        client: whose request it is; requests that wait are admitted fairly between clients, see
            :mod:`engine.fair_queue`. Any stable text that is no secret.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingSpec = SamplingSpec()
    collaboration: Collaboration = Collaboration()
    timeline: bool = False
    client: str = ""
    scores: bool = False
    score_from: int = 1

    @property
    def all_prompts(self) -> list[list[int]]:
        """The base's, and those of members that have another one."""
        return [self.prompt, *(prompt for _, prompt in self.collaboration.prompts)]

    def prompt_of(self, lane: int) -> list[int]:
        """A lane's own, or the request's."""
        return next((prompt for number, prompt in self.collaboration.prompts if number == lane), self.prompt)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model that wrote it, before penalties and temperature.

    Attributes:
        token_ids: the written token first, then the most probable ones in order (it may be among them again).
        logprobs: natural logarithms, same length.
        rank: rank of the written token, 1 is the most probable.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class WrittenWord(msgspec.Struct, frozen=True, array_like=True):
    """A word that an expert of another vocabulary has written.

    Attributes:
        start: number of its first token.
        length: in tokens of the base's vocabulary.
        source: the lane that wrote it.
        logprob: with that lane, all of its own tokens together.
    """

    start: int
    length: int
    source: int
    logprob: float

    def moved(self, tokens: int) -> WrittenWord:
        """The same word, so many tokens further on."""
        return msgspec.structs.replace(self, start=self.start + tokens)


class Look(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How sure the models were at the position of a token: top probabilities, at temperature 1, before penalties.

    Attributes:
        base: the base's; None where it was not asked, as within the word of an expert of another vocabulary.
        expert: the expert's, whether its token was written or stood back; None where no expert was asked, or several
            members wrote. Of a word the lowest of its tokens', up to the one at which it stood back.
        agreed: whether what others drew in the base's place is the base's own token; None where nobody was asked.
    """

    base: float | None = None
    expert: float | None = None
    agreed: bool | None = None


class Token(msgspec.Struct, gc=False):
    """One token that is written.

    Attributes:
        id: in the vocabulary of the lane that starts the request; NO_TOKEN where the text is not written in tokens.
        credit: the lane that wrote it, or BLEND.
        deferral: the deferral probability at its position; None where no gate was asked.
        logprobs: if the request asked for them.
        word: (tokens, log-probability) of the word that it begins, see :class:`WrittenWord`.
        support: of a blended token: its log-probability with each member that took part, in lane order. Of a piece: the
            same; NaN where the member has none of its tokens left that begins like it.
        text: the bytes that it adds, where the text is not written in tokens.
        look: if the request asked for it.
        vetoed: it is the base's own, and an expert stood back for it.
        regretted: it is the base's own, and an expert's was taken back for it.
    """

    id: int
    credit: int
    deferral: float | None = None
    logprobs: TokenLogprobs | None = None
    support: list[float] | None = None
    word: tuple[int, float] | None = None
    text: bytes | None = None
    look: Look | None = None
    vetoed: bool = False
    regretted: bool = False


class Cost(msgspec.Struct, array_like=True, gc=False):
    """What a request has taken so far. Lists have one entry per lane.

    Attributes:
        queue_seconds: from its arrival in the queue to its admission.
        cached_tokens: prompt tokens that the lane which it starts with found in its prefix cache.
        prompt_tokens: positions of its prompts that a lane computed; those that it had to compute again count again.
        seconds: its part of a lane's steps, each of which is divided by the positions that it computed.
    """

    queue_seconds: float = 0.0
    cached_tokens: int = 0
    prompt_tokens: list[int] = []
    seconds: list[float] = []


class Delta(msgspec.Struct, array_like=True, gc=False):
    """What one request gained since its last delta. The per-token lists have the same length, always.

    Attributes:
        tokens: written token ids, in order.
        sources: the lane that wrote each, or BLEND.
        deferrals: the deferral probability at each position as its policy saw it; None where no gate was asked
            (a member alone, or a pair without a gate).
        logprobs: one entry per token if asked for, else None.
        prompt_logprobs: once, with the first delta, if asked for: one entry for each prompt token but the first.
        finish_reason: set on the last delta.
        stop_token: the token id that ended the request, if one did.
        error: what went wrong, when finish_reason is "error".
        code: the same for programs.
        collaboration: with the first delta, unless the request was refused: what is in force, with every default
            that applies filled in (policy, threshold, experts).
        refused: the error is the request's own fault.
        field: the one at fault, as it is named in a request over HTTP, where the error is about one.
        timeline: with the last delta, if asked for: seconds of the machine's monotonic clock at which the request was
            admitted, then for each deferral when it was parked and when its expert token came.
        support: (index in ``tokens``, log-probability with each member that took part) of each blended token.
        words: those that experts of other vocabularies wrote; ``start`` is an index in ``tokens``.
        cost: what the request has taken up to here; None in those that no engine made. In the engine's process this is
            the request's own account, which goes on changing: a delta is encoded before the next step.
        texts: of a text that is not written in tokens but in pieces: the bytes of each. ``tokens`` then are NO_TOKEN.
        looks: one entry per token if asked for, else empty.
        vetoed: index in ``tokens`` of each for which an expert stood back.
        regretted: index in ``tokens`` of each for which an expert's token was taken back.
    """

    request_id: str
    tokens: list[int] = []
    sources: list[int] = []
    deferrals: list[float | None] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    refused: bool = False
    timeline: list[float] | None = None
    code: ErrorCode | None = None
    collaboration: Collaboration | None = None
    support: list[tuple[int, list[float]]] = []
    words: list[WrittenWord] = []
    cost: Cost | None = None
    texts: list[bytes] = []
    field: str | None = None
    looks: list[Look] = []
    vetoed: list[int] = []
    regretted: list[int] = []

    def merge(self, later: Delta) -> None:
        """Take in the next delta of the same request."""
        if later.words:
            self.words += [word.moved(len(self.tokens)) for word in later.words]
        if later.support:
            self.support += [(index + len(self.tokens), values) for index, values in later.support]
        if later.vetoed:
            self.vetoed += [index + len(self.tokens) for index in later.vetoed]
        if later.regretted:
            self.regretted += [index + len(self.tokens) for index in later.regretted]
        self.looks += later.looks
        self.tokens += later.tokens
        self.texts += later.texts
        self.sources += later.sources
        self.deferrals += later.deferrals
        if self.logprobs is None:
            self.logprobs = later.logprobs
        elif later.logprobs is not None:
            self.logprobs += later.logprobs
        if self.prompt_logprobs is None:
            self.prompt_logprobs = later.prompt_logprobs
        if self.collaboration is None:
            self.collaboration = later.collaboration
        self.finish_reason = later.finish_reason
        self.stop_token = later.stop_token
        self.error = later.error
        self.refused = later.refused
        self.code = later.code
        self.field = later.field
        self.timeline = later.timeline
        self.cost = later.cost


class Completion(msgspec.Struct):
    """A finished request, as the offline ``generate`` returns it. Lists as in :class:`Delta`."""

    request_id: str
    tokens: list[int]
    sources: list[int]
    deferrals: list[float | None]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    code: ErrorCode | None = None
    support: list[tuple[int, list[float]]] = []
    words: list[WrittenWord] = []
    cost: Cost | None = None
    texts: list[bytes] = []
    looks: list[Look] = []
    vetoed: list[int] = []
    regretted: list[int] = []


class GateInfo(msgspec.Struct, frozen=True):
    """What the served gate says of itself.

    Attributes:
        source: a path, or "lm_head" for a reference-format base.
        curve: (threshold, share of the tokens that experts wrote at it) of its calibration; empty where none is stored.
        costs: (threshold, seconds of the experts' steps per token at it) of its calibration, where they were measured.
        hindsight: how the base looks back at experts' tokens, where a regret artifact lies beside the gate's.
    """

    source: str
    policy: PolicyName
    threshold: float
    curve: list[tuple[float, float]] = []
    costs: list[tuple[float, float]] = []
    hindsight: Hindsight | None = None


class LaneInfo(msgspec.Struct, frozen=True):
    """A lane as it was started.

    Attributes:
        name: "base", or the expert's name.
        model: path or name of its checkpoint.
        max_model_len: context in tokens, prompt and output together.
        kv_blocks: KV blocks that can hold requests.
        block_size: tokens a KV block.
        can_cut: whether tokens can be taken back. If not in every lane, nobody drafts.
        adapter: the LoRA adapter that the model is served with.
        vocab_size: token ids of the lane's prompts are in [0, vocab_size).
        eos_token_ids: end a text that it writes.
        tokenizer: folder of its ``tokenizer.json``; None where that is not known.
    """

    name: str
    model: str
    max_model_len: int
    kv_blocks: int
    block_size: int
    can_cut: bool = True
    adapter: str | None = None
    vocab_size: int = 0
    eos_token_ids: list[int] = []
    tokenizer: str | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What a client needs to know before its first request.

    Attributes:
        vocab_size: token ids are in [0, vocab_size); the base's where vocabularies differ.
        max_model_len: the smallest context of all lanes.
        eos_token_ids: end a request unless it ignores them; the base's where vocabularies differ.
        coordination: "lockstep" or "overlapped", as resolved.
        policy: for requests that name none.
        thresholds: for requests that name none, by policy: of those that have one and can be used.
        vocabularies: whether the members share one. If not, what :class:`LaneInfo` says of each counts.
        strategies: that the joint model can be asked for; the first is the default.
        veto: for requests that name none.
        regret: for requests that name none.
    """

    lanes: list[LaneInfo]
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    coordination: Literal["lockstep", "overlapped"]
    gate: GateInfo | None
    versions: dict[str, str]
    policy: PolicyName = "never"
    thresholds: dict[PolicyName, float] = {}
    vocabularies: Relation = "same"
    strategies: tuple[StrategyName, ...] = ("deferral",)
    veto: float = 0.0
    regret: float = 1.0

    def lane_context(self, lane: int) -> int:
        """Most tokens of a lane's prompt and output together: where all count alike, the smallest of all lanes."""
        return self.max_model_len if self.vocabularies == "same" else self.lanes[lane].max_model_len

    def lane_vocab_size(self, lane: int) -> int:
        """Token ids of a lane's prompts are in [0, this)."""
        return self.vocab_size if self.vocabularies == "same" else self.lanes[lane].vocab_size

    def lane_ends(self, lane: int) -> list[int]:
        """Token ids that end a text that starts with a lane."""
        return self.eos_token_ids if self.vocabularies == "same" else self.lanes[lane].eos_token_ids

"""What a pair of stand-ins must write, by brute force: one request, one plain loop, the whole prefix at every token.

Written from what the policies and the request's fields are documented to mean; shares nothing with the scheduler but
the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import msgspec

from bench.standin import (
    combination,
    distribution,
    gate_values,
    next_token,
    regret_value,
    support,
    top_probability,
)
from engine import draws
from engine.blends import Blend
from engine.hindsight import Hindsight
from engine.types import BASE, BLEND, Completion, Delta, GenerationRequest, Look, PolicyName, TokenLogprobs, WrittenWord

NEEDS_GATE = ("threshold", "sample")


@dataclass(frozen=True)
class Pair:
    """A base and its experts, as stand-ins, and what the scheduler is told of them."""

    experts: int = 1
    vocab_size: int = 16
    max_model_len: int = 64
    max_num_seqs: int = 8
    eos: tuple[int, ...] = (0,)
    has_gate: bool = True
    policy: PolicyName = "threshold"
    threshold: float = 0.5
    hindsight: Hindsight | None = None

    @property
    def lanes(self) -> int:
        return 1 + self.experts


@dataclass
class Written:
    """All that one request got."""

    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    deferrals: list[float | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token: int | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    support: list[tuple[int, list[float]]] = field(default_factory=list)
    words: list[WrittenWord] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    vetoed: list[int] = field(default_factory=list)
    regretted: list[int] = field(default_factory=list)


class Ledger:
    """Adds up deltas, and refuses those that break a promise: uneven lists, empty ones, one after the last."""

    def __init__(self, deltas: Iterable[Delta] = ()) -> None:
        self.got: dict[str, Written] = {}
        self.take(deltas)

    def take(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            whole = self.got.setdefault(delta.request_id, Written())
            assert whole.finish_reason is None, "a delta after the last one"
            assert delta.tokens or delta.finish_reason, "a delta that says nothing"
            assert len(delta.tokens) == len(delta.sources) == len(delta.deferrals)
            whole.support += [(len(whole.tokens) + index, values) for index, values in delta.support]
            whole.words += [word.moved(len(whole.tokens)) for word in delta.words]
            assert len(delta.looks) in (0, len(delta.tokens))
            whole.looks += delta.looks
            whole.vetoed += [len(whole.tokens) + index for index in delta.vetoed]
            whole.regretted += [len(whole.tokens) + index for index in delta.regretted]
            whole.tokens += delta.tokens
            whole.sources += delta.sources
            whole.deferrals += delta.deferrals
            if delta.logprobs is not None:
                assert [entry.token_ids[0] for entry in delta.logprobs] == delta.tokens
                whole.logprobs = (whole.logprobs or []) + delta.logprobs
            if delta.prompt_logprobs is not None:
                assert whole.prompt_logprobs is None, "prompt_logprobs twice"
                whole.prompt_logprobs = delta.prompt_logprobs
            whole.finish_reason, whole.stop_token, whole.error = delta.finish_reason, delta.stop_token, delta.error

    def finished(self, request_id: str) -> bool:
        return request_id in self.got and self.got[request_id].finish_reason is not None


def allowed_experts(request: GenerationRequest, pair: Pair) -> tuple[int, ...]:
    """Lanes that may be deferred to, in the request's order."""
    collaboration = request.collaboration
    if collaboration.member is not None:
        return ()
    if collaboration.blend is not None:
        return tuple(lane for lane, weight in members(collaboration.blend) if lane != BASE)
    return tuple(range(1, pair.lanes)) if collaboration.experts is None else collaboration.experts


def members(blend: Blend) -> list[tuple[int, float]]:
    """Those that take part in a blend, with their weights."""
    return [(lane, weight) for lane, weight in blend.weights if weight or blend.from_gate]


def impossible(blend: Blend, request: GenerationRequest, pair: Pair) -> bool:
    """Whether a blend cannot be served, whatever else the request asks for."""
    lanes = [lane for lane, _ in blend.weights]
    weights = [weight for _, weight in blend.weights]
    taking_part = members(blend)
    allowed = request.collaboration.experts
    return (
        request.collaboration.member is not None
        or not lanes
        or lanes != sorted(set(lanes))
        or lanes[-1] >= pair.lanes
        or not taking_part
        or (blend.kind != "product" and not blend.from_gate and not math.isclose(sum(weights), 1, abs_tol=1e-6))
        or (blend.from_gate and not (pair.has_gate and blend.kind == "mixture" and lanes[0] == BASE and lanes[1:]))
        or (blend.plausibility > 0 and blend.anchor not in dict(taking_part))
        or (allowed is not None and any(lane not in (BASE, *allowed) for lane, _ in taking_part))
        or ([lane for lane, _ in taking_part] == [BASE] and not own_distribution(blend))
    )


def own_distribution(blend: Blend) -> bool:
    """Whether it is one member's own distribution."""
    weights = [weight for _, weight in members(blend)]
    return weights == [1.0] and blend.kind != "union" and not blend.plausibility and not blend.from_gate


def refused(request: GenerationRequest, pair: Pair) -> bool:
    """Whether the request cannot be served at all."""
    member = request.collaboration.member
    if (blend := request.collaboration.blend) is not None and impossible(blend, request, pair):
        return True
    experts = allowed_experts(request, pair)
    own = dict(request.collaboration.prompts)
    return (
        any(not 0 < len(prompt) < pair.max_model_len for prompt in (request.prompt, *own.values()))
        or bool(own and (member is not None or not all(1 <= lane < pair.lanes for lane in own)))
        or request.sampling.max_tokens < 1
        or (request.scores and (len(request.prompt) < 2 or member is not None or bool(own)))
        or bool(request.collaboration.veto and (blend is not None or (request.scores and averages(request, pair))))
        or (regrets(request) and (blend is not None or request.scores or bool(experts and pair.hindsight is None)))
        or not 0 <= (member or 0) < pair.lanes
        or any(not 1 <= lane < pair.lanes for lane in experts)
        or (bool(experts) and not pair.has_gate and (request.collaboration.policy or pair.policy) in NEEDS_GATE)
    )


def regrets(request: GenerationRequest) -> bool:
    """Whether experts' tokens may be taken back."""
    regret = request.collaboration.regret
    return regret is not None and regret < 1


def averages(request: GenerationRequest, pair: Pair) -> bool:
    """Whether a text is scored by the marginal over the gate."""
    return bool(allowed_experts(request, pair)) and (request.collaboration.policy or pair.policy) in NEEDS_GATE


def look(request: GenerationRequest, pair: Pair, prefix: list[int], expert_tokens: int) -> tuple[int, float | None]:
    """Who writes after ``prefix``, and the deferral probability there."""
    collaboration = request.collaboration
    experts = allowed_experts(request, pair)
    if not experts:
        return collaboration.member or BASE, None
    policy = collaboration.policy or pair.policy
    threshold = collaboration.threshold
    if threshold is None:
        threshold = 0.5 if policy == "confidence" else pair.threshold
    deferral = None
    odds = dict.fromkeys(experts, 1.0)
    if pair.has_gate:
        values = gate_values(prefix, pair.experts)
        odds = {lane: math.exp(values[lane - 1]) for lane in experts}
        deferral = sum(odds.values()) / (1.0 + sum(odds.values()))
    if policy == "confidence":
        deferral = 1.0 - top_probability(BASE, prefix)
    if collaboration.max_expert_tokens is not None and expert_tokens >= collaboration.max_expert_tokens:
        return BASE, deferral
    likeliest = next(lane for lane in experts if odds[lane] == max(odds.values()))
    draw = draws.uniform(request.sampling.seed or 0, draws.POLICY_STREAM, len(prefix))
    match policy:
        case "always":
            return likeliest, deferral
        case "threshold" | "confidence":
            assert deferral is not None
            return (likeliest if deferral > threshold else BASE), deferral
        case "random":
            return (likeliest if draw < collaboration.rate else BASE), deferral
        case "sample":
            bound = 0.0
            for lane in experts:
                bound += odds[lane] / (1.0 + sum(odds.values()))
                if draw < bound:
                    return lane, deferral
    return BASE, deferral


def complete(request: GenerationRequest, pair: Pair) -> Written:
    """The request, written to its end: from its beginning again whenever a token is taken back."""
    taken_back: set[int] = set()
    standing: set[int] = set()
    while True:
        whole = uncut(request, pair, taken_back)
        if not regrets(request) or whole.finish_reason == "error" or not allowed_experts(request, pair):
            return whole
        for index in range(request.sampling.min_tokens, len(whole.tokens)):
            disputed = whole.sources[index] != BASE and whole.tokens[index] != own(request, pair, whole, index)
            if disputed and index not in standing:
                if regret(request, pair, whole, index) > (request.collaboration.regret or 0.0):
                    taken_back.add(index)
                    break
                standing.add(index)
        else:
            return whole


def own(request: GenerationRequest, pair: Pair, whole: Written, index: int) -> int:
    """The base's token at an index of the text."""
    return next_token(BASE, [*request.prompt, *whole.tokens[:index]], pair.vocab_size)


def regret(request: GenerationRequest, pair: Pair, whole: Written, index: int) -> float:
    """How much the expert's token at an index of the text is regretted."""
    assert pair.hindsight is not None
    prompts = dict(request.collaboration.prompts)

    def sure(lane: int, place: int) -> float:
        probability = top_probability(lane, [*prompts.get(lane, request.prompt), *whole.tokens[:place]])
        inside = min(max(probability, 1e-6), 1 - 1e-6)
        return math.log(inside / (1 - inside))

    last = min(index + pair.hindsight.ahead, len(whole.tokens) - 1)
    between = [sure(whole.sources[place], place) for place in range(index + 1, last) if whole.sources[place] != BASE]
    numbers = [
        sure(BASE, index),
        sure(whole.sources[index], index),
        sure(BASE, last),
        min([*between, math.log(1e6 - 1)]),
    ]
    weighted = sum(weight * number for weight, number in zip(pair.hindsight.weights, numbers, strict=True))
    return 1 / (1 + math.exp(-weighted - regret_value([*request.prompt, *whole.tokens[:last]])))


def uncut(request: GenerationRequest, pair: Pair, taken_back: Container[int] = ()) -> Written:
    """The request, written to its end; where experts' tokens were taken back, the base's own stand."""
    whole = Written()
    if refused(request, pair):
        whole.finish_reason = "error"
        return whole
    sampling = request.sampling
    if request.scores:
        whole.finish_reason = "length"
        whole.prompt_logprobs = [scored(request, pair, position) for position in range(1, len(request.prompt))]
        return whole
    own = dict(request.collaboration.prompts)
    longest = max(map(len, (request.prompt, *own.values())))
    while whole.finish_reason is None:
        prefix = [*request.prompt, *whole.tokens]
        prefixes = [[*own.get(lane, request.prompt), *whole.tokens] for lane in range(pair.lanes)]
        expert_tokens = sum(source != BASE for source in whole.sources)
        writer, deferral = look(request, pair, prefix, expert_tokens)
        token = next_token(writer, prefixes[writer], pair.vocab_size)
        blend = request.collaboration.blend
        base_token = next_token(BASE, prefix, pair.vocab_size)
        sure = [top_probability(lane, prefixes[lane]) for lane in range(pair.lanes)]
        seen = Look(sure[BASE])
        if writer != BASE:
            seen = Look(sure[BASE], sure[writer], token == base_token)
            if request.collaboration.member is not None:
                seen = Look(None, sure[writer])
            elif sure[writer] < (request.collaboration.veto or 0.0):
                whole.vetoed.append(len(whole.tokens))
                writer, token = BASE, base_token
        if len(whole.tokens) in taken_back:
            whole.regretted.append(len(whole.tokens))
            writer, token = BASE, base_token
        if writer != BASE and blend is not None and not own_distribution(blend):
            said = [distribution(lane, prefixes[lane]) for lane, _ in members(blend)]
            combined = msgspec.structs.replace(blend, weights=tuple(members(blend)))
            gate = gate_values(prefix, pair.experts) if blend.from_gate else None
            token, writer = combination(combined, said, gate) % pair.vocab_size, BLEND
            whole.support.append((len(whole.tokens), [support(of, token) for of in said]))
            seen = Look(sure[BASE], None, token == base_token)
        if request.collaboration.looks:
            whole.looks.append(seen)
        whole.tokens.append(token)
        whole.sources.append(writer)
        whole.deferrals.append(deferral)
        ends = token in sampling.stop_token_ids or (token in pair.eos and not sampling.ignore_eos)
        if ends and len(whole.tokens) >= sampling.min_tokens:
            whole.finish_reason, whole.stop_token = "stop", token
        elif len(whole.tokens) == sampling.max_tokens or longest + len(whole.tokens) == pair.max_model_len:
            whole.finish_reason = "length"
    return whole


def scored(request: GenerationRequest, pair: Pair, position: int) -> TokenLogprobs:
    """What the joint model says of the prompt's token at this position, given those before it."""
    prefix, token = request.prompt[:position], request.prompt[position]
    collaboration = request.collaboration
    unlimited = msgspec.structs.replace(
        request, collaboration=msgspec.structs.replace(collaboration, max_expert_tokens=None)
    )
    writer, _ = look(unlimited, pair, prefix, 0)
    policy, blend, experts = collaboration.policy or pair.policy, collaboration.blend, allowed_experts(request, pair)
    if writer != BASE and top_probability(writer, prefix) < (collaboration.veto or 0.0):
        writer = BASE
    said = distribution(writer, prefix)
    if blend is None and policy in NEEDS_GATE and experts:
        marginal = Blend("mixture", tuple((lane, 0.0) for lane in (BASE, *sorted(experts))), from_gate=True)
        said = combination(marginal, [distribution(lane, prefix) for lane, _ in marginal.weights], gates(pair, prefix))
    elif writer != BASE and blend is not None and not own_distribution(blend):
        combined = msgspec.structs.replace(blend, weights=tuple(members(blend)))
        gate = gates(pair, prefix) if blend.from_gate else None
        said = combination(combined, [distribution(lane, prefix) for lane, _ in members(blend)], gate)
    count = request.sampling.prompt_logprobs or 0
    others = [(token + step) % pair.vocab_size for step in range(count)]
    return TokenLogprobs([token, *others], [support(said, token), *(-0.5 - step for step in range(count))], 1)


def gates(pair: Pair, prefix: list[int]) -> list[float]:
    """The gate's values after ``prefix``."""
    return gate_values(prefix, pair.experts)


def check(
    got: Written | Completion,
    request: GenerationRequest,
    pair: Pair,
    write: Callable[[GenerationRequest, Pair], Written] = complete,
) -> None:
    """``got`` is what brute force writes; if it was aborted, the beginning of that.

    A ``Completion`` does not carry the stop token.
    """
    expected = write(request, pair)
    count = len(got.tokens)
    aborted = got.finish_reason == "aborted"
    assert got.finish_reason in (expected.finish_reason, "aborted")
    assert got.tokens == (expected.tokens[:count] if aborted else expected.tokens)
    assert got.sources == expected.sources[:count]
    assert got.support == [item for item in expected.support if item[0] < count]
    assert got.words == [word for word in expected.words if word.start < count]
    assert got.looks == expected.looks[:count]
    assert got.vetoed == [index for index in expected.vetoed if index < count]
    assert got.regretted == [index for index in expected.regretted if index < count]
    assert all(map(_same_probability, got.deferrals, expected.deferrals))
    assert len(got.deferrals) == count
    if isinstance(got, Written):
        assert got.stop_token == (None if aborted else expected.stop_token)
    assert (got.error is not None) == (got.finish_reason == "error")
    asked = request.sampling.logprobs is not None and count > 0
    assert len(got.logprobs or []) == (count if asked else 0)
    if request.scores:
        assert got.prompt_logprobs == (None if aborted else expected.prompt_logprobs)
    elif request.sampling.prompt_logprobs is None or got.finish_reason == "error":
        assert got.prompt_logprobs is None
    elif not aborted:
        assert got.prompt_logprobs is not None
        assert [entry.token_ids[0] for entry in got.prompt_logprobs] == request.prompt[1:]


def _same_probability(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-12)

"""UniTE with SAFE's checks, without the engine: one plain loop over Hugging Face models, without drafts, which reads
and spells the whole text anew for every token.

Written from the papers and docs/strategies.md; shares nothing with the engine but the random draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine import draws
from engine.types import BASE, BLEND, GenerationRequest
from tests.oracle.blend_loop import drawn
from tests.oracle.characters_loop import Member, _encode, _unfinished
from tests.oracle.words_loop import aligned


@dataclass
class Written:
    """What one request got, and how near its strings came to others."""

    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    support: list[tuple[int, list[float]]] = field(default_factory=list)
    finish_reason: str = "length"
    unaligned: int = 0
    agreed: int = 0
    margins: list[float] = field(default_factory=list)


def ranked(table: dict[bytes, float]) -> list[bytes]:
    return sorted(table, key=lambda string: (-table[string], string))


def score(member: Member, table: dict[bytes, float], string: bytes, kind: str) -> float:
    if string in table:
        return table[string]
    mass = sum(chance for own, chance in table.items() if own.startswith(string))
    if kind == "mass" and mass:
        return mass
    return table[member.bytes_of[_encode(member, string)[0]]]


def write(members: Sequence[Member], request: GenerationRequest) -> Written:
    """Write one text; the base is the first member."""
    whole, sampling, collaboration = Written(), request.sampling, request.collaboration
    blend = collaboration.blend
    assert blend is not None
    weights, kind = dict(blend.weights), blend.score or "mass"
    base, expert = members
    seed = sampling.seed or 0
    text = b""
    asked_tokens = 0
    while len(whole.tokens) < sampling.max_tokens:
        ids = [*base.prompt, *whole.tokens]
        with torch.no_grad():
            logits = base.model(torch.tensor([ids])).logits[0, -1].float()
        allowed = logits.clone()
        if len(whole.tokens) < sampling.min_tokens:
            allowed[base.end] = -torch.inf
        own = drawn(allowed, seed, len(ids), sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        draft = b"" if own == base.end else base.bytes_of.get(own)
        deferral = {
            "always": True,
            "random": draws.uniform(seed, draws.POLICY_STREAM, len(ids)) < collaboration.rate,
            "confidence": 1 - float(logits.softmax(-1).max()) > (collaboration.threshold or 0.0),
        }[collaboration.policy or "always"]
        limit = collaboration.max_expert_tokens
        asked = deferral and draft is not None and (limit is None or asked_tokens < limit)
        asked = asked and not (own == base.end and sampling.ignore_eos)
        expert.strand = _encode(expert, text)
        if asked and blend.align is not False and (_unfinished(text) or not aligned(expert, text, draft or b"")):
            whole.unaligned += 1
            asked = False
        tokens, source = [own], BASE
        if asked:
            assert draft is not None
            base.strand = list(whole.tokens)
            tables = {lane: member.dictionary() for lane, member in enumerate(members) if weights.get(lane)}
            mean = sum(weights[lane] * table.get(draft, 0.0) for lane, table in tables.items())
            greedy = sampling.temperature == 0
            if greedy and (mean > 0.5 or all(max(table, key=table.__getitem__) == draft for table in tables.values())):
                whole.agreed += 1
            else:
                strings = {string for table in tables.values() for string in ranked(table)[: blend.top]}
                joint = dict.fromkeys(strings, 0.0)
                for lane, table in tables.items():
                    scores = {string: score(members[lane], table, string, kind) for string in strings}
                    for string in strings:
                        joint[string] += weights[lane] * scores[string] / sum(scores.values())
                if sampling.ignore_eos or len(whole.tokens) < sampling.min_tokens:
                    joint.pop(b"", None)
                string, margin = choose(joint, request, len(whole.tokens))
                whole.margins.append(margin)
                source = BLEND
                said = [score(members[lane], table, string, kind) for lane, table in tables.items()]
                whole.support.append((len(whole.tokens), [math.log(chance) for chance in said]))
                if string != draft:
                    exact = base.token_for(string) if string else base.end
                    tokens = _encode(base, string) if exact is None else [exact]
                    tokens = tokens[: sampling.max_tokens - len(whole.tokens)]
                    tokens = tokens[: None if limit is None else limit - asked_tokens]
            asked_tokens += len(tokens)
        whole.tokens += tokens
        whole.sources += [source] * len(tokens)
        text += b"".join(base.bytes_of.get(token, b"") for token in tokens)
        if tokens[-1] == base.end and not sampling.ignore_eos:
            whole.finish_reason = "stop"
            break
    return whole


def choose(joint: dict[bytes, float], request: GenerationRequest, number: int) -> tuple[bytes, float]:
    """A string of the average, and how far it was from another one."""
    sampling = request.sampling
    order = [string for string in ranked(joint) if joint[string] > 0]
    total = sum(joint.values())
    if not sampling.temperature:
        return order[0], (joint[order[0]] - joint[order[1]]) / total if len(order) > 1 else 1.0
    heights = [(joint[string] / joint[order[0]]) ** (1 / sampling.temperature) for string in order]
    kept = [(s, h) for s, h in zip(order, heights, strict=True) if h >= sampling.min_p][: sampling.top_k or None]
    nucleus, seen, total = [], 0.0, sum(h for _, h in kept)
    for s, h in kept:
        if seen >= sampling.top_p * total:
            break
        nucleus.append((s, h))
        seen += h
    at = draws.uniform(sampling.seed or 0, draws.SYMBOL_STREAM, number) * seen
    for s, h in nucleus:
        if at < h:
            return s, min(at, h - at) / seen
        at -= h
    return nucleus[-1][0], 0.0

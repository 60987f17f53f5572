"""Deferral over several vocabularies without the engine: one plain loop over Hugging Face models, which reads and
spells the whole text anew for every token.

Written from docs/strategies.md; shares nothing with the engine but the random draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine import draws
from engine.types import BASE, GenerationRequest, WrittenWord
from tests.oracle.blend_loop import drawn
from tests.oracle.characters_loop import Member, _encode, _safe, _unfinished, follow

MOST = 64


@dataclass
class Written:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    words: list[WrittenWord] = field(default_factory=list)
    finish_reason: str = "length"
    unaligned: int = 0


def begins(member: Member, text: bytes, upcoming: bytes) -> bool:
    """Whether ``upcoming`` begins a word of a member's behind ``text``."""
    if not text or not upcoming or _safe(member, text + upcoming, len(text)):
        return True
    return text[-1:] in (b"\n", b"\r", b"\t") and not upcoming[:1].isspace()


def aligned(expert: Member, text: bytes, upcoming: bytes) -> bool:
    """Whether one of the expert's tokens ends where the text does, if ``upcoming`` follows."""
    ends = [0]
    for token in expert.strand:
        ends.append(ends[-1] + len(expert.bytes_of[token]))
    whole = text + upcoming
    at = max((i for i in range(1, len(text) + 1) if i in ends and _safe(expert, whole, i)), default=0)
    offsets = {at}
    for token in _encode(expert, whole[at:]):
        at += len(expert.bytes_of[token])
        offsets.add(at)
    return len(text) in offsets


def write(members: Sequence[Member], request: GenerationRequest) -> Written:
    """Write one text; the base is the first member."""
    whole, sampling, collaboration = Written(), request.sampling, request.collaboration
    base, *experts = members
    seed = sampling.seed or 0
    text = b""

    def sample(member: Member, tokens: list[int]) -> tuple[int, torch.Tensor]:
        ids = [*member.prompt, *tokens]
        with torch.no_grad():
            logits = member.model(torch.tensor([ids])).logits[0, -1].float()
        allowed = logits
        if member is base and len(whole.tokens) < sampling.min_tokens:
            allowed = logits.clone()
            allowed[member.end] = -torch.inf
        token = drawn(allowed, seed, len(ids), sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        return token, logits.log_softmax(-1)

    while len(whole.tokens) < sampling.max_tokens:
        own, logp = sample(base, whole.tokens)
        upcoming = base.bytes_of.get(own, b"")
        position = len(base.prompt) + len(whole.tokens)
        deferral = {
            "always": True,
            "random": draws.uniform(seed, draws.POLICY_STREAM, position) < collaboration.rate,
            "confidence": 1 - float(logp.max().exp()) > (collaboration.threshold or 0.0),
        }[collaboration.policy or "always"]
        limit = collaboration.max_expert_tokens
        count = sum(source != BASE for source in whole.sources)
        source, tokens, piece = BASE, [own], upcoming
        expert, heard, said, logprob = experts[0], b"", [], 0.0
        if deferral and (limit is None or count < limit):
            expert.strand = follow(expert, expert.history)
            behind_own = bool(expert.history) and expert.history[-1][1]
            begun = behind_own or (begins(base, text, upcoming) and aligned(expert, text, upcoming))
            if _unfinished(text) or not begun:
                whole.unaligned += 1
            else:
                while True:
                    token, chances = sample(expert, [*expert.strand, *said])
                    part = expert.bytes_of.get(token)
                    if token == expert.end and not said and not sampling.ignore_eos:
                        if len(whole.tokens) + 1 >= sampling.min_tokens:
                            source, tokens, piece, logprob = 1, [base.end], b"", float(chances[token])
                        break
                    long = heard and len(heard) + len(part or b"") > MOST and not _unfinished(heard)
                    line_ends = part is not None and part[:1] in (b"\r", b"\n") and not heard[-1:].isspace()
                    if part is None or long or (heard and (line_ends or begins(expert, text + heard, part))):
                        break
                    heard, said, logprob = heard + part, [*said, token], logprob + float(chances[token])
                if said:
                    tokens = _encode(base, heard)[: None if limit is None else limit - count]
                    source, tokens, piece = 1, tokens[: sampling.max_tokens - len(whole.tokens)], heard
        expert.history += [(expert.bytes_of[token], True) for token in said] if said else [(piece, False)]
        if source != BASE:
            whole.words.append(WrittenWord(len(whole.tokens), len(tokens), source, logprob))
        text += piece
        whole.tokens += tokens
        whole.sources += [source] * len(tokens)
        if tokens[-1] == base.end and not sampling.ignore_eos:
            whole.finish_reason = "stop"
            break
    return whole

"""What a base and experts of other vocabularies must write as unions, by brute force over the toy tokenizers.

One request, one plain loop without drafts: the whole text is spelled anew for every member at every position. Written
from docs/strategies.md; shares nothing with the engine but the stand-ins' draws and distributions.
"""

from __future__ import annotations

import math

from bench.standin import mass_of, next_token
from engine import draws
from engine.types import BASE, BLEND, GenerationRequest
from tests.engine import toys
from tests.engine.oracle import Pair, Written, look, refused
from tests.engine.words_oracle import bytes_of, ends_of, last_safe, spell

Table = dict[bytes, float]
"""What a member says of each of its strings; b"" is the end of the text."""


def table_of(lane: int, tokens: list[int]) -> Table:
    vocabulary = toys.speller(lane).vocabulary
    mass = mass_of(lane, tokens, vocabulary)
    found = {b"": mass.end}
    for token in range(toys.size(lane)):
        if (string := bytes_of(lane, token)) is not None:
            found[string] = mass.at(string)
    return found


def drafted(tokens: list[int]) -> int:
    """The base's own token: mostly of its most probable string, so that drafts often stand."""
    token = next_token(BASE, tokens, toys.size(BASE))
    if token % 4 == 0:
        return token
    string = best(table_of(BASE, tokens))
    return next((t for t in range(toys.size(BASE)) if string and bytes_of(BASE, t) == string), toys.end(BASE))


def ranked(table: Table) -> list[bytes]:
    return sorted(table, key=lambda string: (-table[string], string))


def best(table: Table) -> bytes:
    """Of the end and a string that are as probable, the string."""
    return min(table, key=lambda string: (-table[string], string == b"", string))


def score(lane: int, table: Table, string: bytes, kind: str) -> float:
    if string in table:
        return table[string]
    mass = sum(chance for own, chance in table.items() if own.startswith(string))
    if kind == "mass" and mass:
        return mass
    return table[bytes_of(lane, spell(lane, string)[0]) or b""]


def aligned(lane: int, text: bytes, upcoming: bytes) -> bool:
    tokens = spell(lane, text)
    at = last_safe(lane, tokens, text + upcoming, len(text))
    ahead = [at + end for end in ends_of(lane, spell(lane, (text + upcoming)[at:]))]
    return len(text) in (at, *ahead)


def drawn(joint: Table, request: GenerationRequest, number: int) -> bytes:
    """A string of the average: by temperature, then min_p, top_k and top_p, as tokens are."""
    sampling = request.sampling
    order = [string for string in ranked(joint) if joint[string] > 0]
    if not sampling.temperature:
        return order[0]
    heights = [(joint[string] / joint[order[0]]) ** (1 / sampling.temperature) for string in order]
    kept = [(s, h) for s, h in zip(order, heights, strict=True) if h >= sampling.min_p]
    kept = kept[: sampling.top_k or None]
    total, seen, nucleus = sum(h for _, h in kept), 0.0, []
    for s, h in kept:
        if seen >= sampling.top_p * total:
            break
        nucleus.append((s, h))
        seen += h
    at = draws.uniform(sampling.seed or 0, draws.SYMBOL_STREAM, number) * sum(h for _, h in nucleus)
    for s, h in nucleus:
        at -= h
        if at < 0:
            return s
    return nucleus[-1][0]


def complete(request: GenerationRequest, pair: Pair) -> Written:
    """The request, written to its end."""
    whole = Written()
    sampling, collaboration = request.sampling, request.collaboration
    blend = collaboration.blend
    assert blend is not None
    if refused(request, pair):
        whole.finish_reason = "error"
        return whole
    members = [(lane, weight) for lane, weight in blend.weights if weight]
    experts = [lane for lane, _ in members if lane != BASE]
    prompts = dict(collaboration.prompts)
    most = min(sampling.max_tokens, pair.max_model_len - max(map(len, (request.prompt, *prompts.values()))))
    limit = collaboration.max_expert_tokens
    decided = 0
    text = b""

    def ends(token: int, length: int) -> bool:
        stops = token in sampling.stop_token_ids or (token in pair.eos and not sampling.ignore_eos)
        return stops and length >= sampling.min_tokens

    while whole.finish_reason is None:
        prefix = [*request.prompt, *whole.tokens]
        own = drafted(prefix)
        draft = b"" if own in pair.eos else bytes_of(BASE, own)
        asked, deferral = look(request, pair, prefix, decided)
        asked = asked != BASE and draft is not None and not (own in pair.eos and sampling.ignore_eos)
        strands = {lane: [*prompts.get(lane, request.prompt), *spell(lane, text)] for lane in experts}
        if blend.align is not False and asked:
            asked = not text.endswith(b"\xc3") and all(aligned(lane, text, draft or b"") for lane in experts)
        asked = asked and all(len(strand) < pair.max_model_len for strand in strands.values())
        tokens, source = [own], BASE
        if asked:
            assert draft is not None
            tables = [table_of(lane, strands.get(lane, prefix)) for lane, _ in members]
            mean = sum(weight * table.get(draft, 0.0) for (_, weight), table in zip(members, tables, strict=True))
            if sampling.temperature or not (mean > 0.5 or all(best(table) == draft for table in tables)):
                kind = blend.score or "mass"
                # In order: in another one sums are rounded otherwise, and equal strings are none.
                union = sorted({string for table in tables for string in ranked(table)[: blend.top]})
                joint = dict.fromkeys(union, 0.0)
                for (lane, weight), table in zip(members, tables, strict=True):
                    scores = {string: score(lane, table, string, kind) for string in union}
                    for string in union:
                        joint[string] += weight * scores[string] / (sum(scores.values()) or 1.0)
                if sampling.ignore_eos or len(whole.tokens) < sampling.min_tokens:
                    joint.pop(b"", None)
                if any(joint.values()):
                    string = drawn(joint, request, len(whole.tokens))
                    exact = [t for t in range(toys.size(BASE)) if bytes_of(BASE, t) == string]
                    if string != draft:
                        tokens = ([pair.eos[0]] if not string else exact) or spell(BASE, string)
                        tokens = tokens[: None if limit is None else limit - decided][: most - len(whole.tokens)]
                        stops = [n for n, token in enumerate(tokens, 1) if ends(token, len(whole.tokens) + n)]
                        tokens = tokens[: min(stops, default=None)]
                    source = BLEND
                    said = [score(lane, table, string, kind) for (lane, _), table in zip(members, tables, strict=True)]
                    whole.support.append((len(whole.tokens), [math.log(p) if p else -math.inf for p in said]))
            decided += len(tokens)
        whole.tokens += tokens
        whole.sources += [source] * len(tokens)
        whole.deferrals += [deferral, *[None] * (len(tokens) - 1)]
        text += b"".join(bytes_of(BASE, token) or b"" for token in tokens)
        if ends(whole.tokens[-1], len(whole.tokens)):
            whole.finish_reason, whole.stop_token = "stop", whole.tokens[-1]
        elif len(whole.tokens) == most:
            whole.finish_reason = "length"
    return whole

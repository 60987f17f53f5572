"""The oracle of blends: plain float32 loops over Hugging Face models that say what a blend writes, and what it scores.

Written from the methods' definitions; shares no code with the engine but the draws' keys, and vLLM's noise for a key,
which is a matter of agreement and no result. The whole prefix goes through every model at every token. Prefixes are
padded on the right, where causal attention does not see the padding, so that many prompts go in one pass.

Mixture: sum of w_i D_i. Product: sum of w_i z_i, if asked only where the anchor finds a token plausible (arXiv
2210.15097, 2309.09117; proxy tuning: 2401.08565; classifier-free guidance: 2306.17806). Union: the mixture of each
member's softmax over the union of all members' top k (UniTE, 2410.03777, with one vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.platforms import current_platform

from engine import draws
from tests.oracle.reference import Pair, adjusted, probabilities

current_platform.import_kernels()
DEVICE = current_platform.device_type

BASE = 0
BLEND = -1
"""The source of a token that several members wrote together."""
NEGATIVE = -2
"""The base under its negative prompt, among the members of a blend."""

Policy = Literal["always", "never", "threshold", "confidence", "random", "sample"]
Form = Callable[[list[int]], tuple[list[int], bool]]
"""What was written -> the tokens that the form allows next, ends aside, and whether it is complete."""


@dataclass(frozen=True)
class Blend:
    """What is written where the policy asks. ``weights``: (member, weight); a member of weight 0 is not asked.

    Attributes:
        weights: "gate": P(Z = k) of the base and of every expert, for mixtures.
        anchor: whose most probable token bounds the plausible ones of a product.
        plausibility: least share of that token's probability; 0 is no bound.
        top: of unions: how many tokens of each member.
    """

    kind: Literal["mixture", "product", "union"]
    weights: tuple[tuple[int, float], ...] | Literal["gate"]
    anchor: int = BASE
    plausibility: float = 0.0
    top: int = 0


def proxy(alpha: float = 1.0, tuned: int = 1, untuned: int = 2) -> Blend:
    """The base, moved as tuning moved a small model: s_M + alpha (s_tuned - s_untuned)."""
    return Blend("product", ((BASE, 1.0), (tuned, alpha), (untuned, -alpha)))


def contrastive(alpha: float = 0.1, beta: float = 0.5, expert: int = 1, amateur: int = BASE) -> Blend:
    """(1 + beta) s_expert - beta s_amateur, where the expert finds a token plausible."""
    return Blend("product", ((expert, 1 + beta), (amateur, -beta)), anchor=expert, plausibility=alpha)


def guidance(gamma: float) -> Blend:
    """Classifier-free guidance: gamma s(prompt) + (1 - gamma) s(negative prompt)."""
    return Blend("product", ((BASE, gamma), (NEGATIVE, 1 - gamma)))


@dataclass
class Blended:
    """What one prompt got.

    Attributes:
        support: where blended, each asked member's own log-probability of the written token; else None.
        logprobs: the written token's, in the row that it was taken from, which a form has bound already, before
            penalties and temperature.
        rows: those rows as log-probabilities [V].
    """

    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    deferrals: list[float] = field(default_factory=list)
    support: list[dict[int, float] | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    finish_reason: str | None = None


def combine(blend: Blend, rows: dict[int, torch.Tensor], weights: dict[int, float]) -> torch.Tensor:
    """Logits [V] of the blend from its members' [V], in float64."""
    asked = {member: weight for member, weight in weights.items() if weight != 0}
    z = {member: rows[member].double() for member in {*asked, *([blend.anchor] if blend.plausibility else [])}}
    if blend.kind == "product":
        total = sum(weight * z[member] for member, weight in asked.items())
        assert isinstance(total, torch.Tensor)
        if blend.plausibility:
            anchor = z[blend.anchor]
            implausible = anchor < anchor.max() + math.log(blend.plausibility)
            # Not -inf: where a grammar leaves only such tokens, the anchor's own order decides.
            total = torch.where(implausible, anchor - 1e4, total)
        return total

    def average(inside: torch.Tensor) -> torch.Tensor:
        parts = [
            math.log(weight) + z[member].masked_fill(~inside, -torch.inf).log_softmax(-1)
            for member, weight in asked.items()
        ]
        return torch.stack(parts).logsumexp(0)

    everything = torch.ones_like(next(iter(z.values())), dtype=torch.bool)
    if blend.kind == "mixture":
        return average(everything)
    inside = torch.zeros_like(everything)
    for row in z.values():
        inside[row.topk(min(blend.top, len(row))).indices] = True
    # A form may leave nothing of the union: then the mixture's order decides.
    return torch.where(inside, average(inside), average(everything) - 1e4)


def noisy_argmax(logits: torch.Tensor, seed: int, position: int) -> int:
    """A draw from softmax(logits) [V] by the noise that vLLM's sampler on this platform takes for this key."""
    key = draws.key(seed, draws.TOKEN_STREAM, position)
    noise = torch.tensor([key - (1 << 64) if key >> 63 else key], device=DEVICE)
    row = logits[None].float().contiguous().to(DEVICE)
    if current_platform.is_cpu():
        return int(torch.ops._C.fused_gumbel_argmax(row, noise)[0])
    # A GPU's noise comes from a kernel that has no other form.
    from engine.vllm_hooks.sampling import draw

    return int(draw(row, noise)[0])


def drawn(
    logits: torch.Tensor, seed: int, position: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> int:
    """The token: the first of the greatest if greedy, else a draw after temperature, min_p, top_k, top_p, in order."""
    logits = logits.float()
    if temperature == 0:
        return int((logits == logits.max()).nonzero()[0])
    logits = logits / temperature
    share = torch.softmax(logits, -1)
    logits = logits.masked_fill(share < min_p * share.max(), -torch.inf)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        share, order = torch.softmax(logits, -1).sort()
        outside = share.cumsum(-1) <= 1 - top_p
        outside[-1] = False
        logits = logits.index_fill(0, order[outside], -torch.inf)
    return noisy_argmax(logits, seed, position)


def next_rows(model: Any, prefixes: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [N, d] after the final norm, and logits [N, V], after each prefix."""
    padded = pad_sequence([torch.tensor(prefix) for prefix in prefixes], batch_first=True)
    hidden_NTd = model.base_model(input_ids=padded, use_cache=False)[0]
    hidden = hidden_NTd[torch.arange(len(prefixes)), [len(prefix) - 1 for prefix in prefixes]]
    return hidden.float(), model.get_output_embeddings()(hidden).float()


@dataclass(frozen=True)
class Look:
    """One position of one text as the method sees it."""

    share: list[float]  # P(Z = k), k = 0..K
    deferral: float
    source: int  # BASE, an expert, or BLEND
    row: torch.Tensor  # logits [V] of what writes here
    members: dict[int, torch.Tensor]  # log-probabilities [V] of each member that is asked


@dataclass(frozen=True)
class Method:
    """A pair, and what decides where and what. ``blend`` None is deferral: the likeliest expert writes alone."""

    pair: Pair
    blend: Blend | None = None
    policy: Policy = "always"
    threshold: float = 0.5
    rate: float = 0.0

    def look(
        self, prompts: Sequence[dict[int, list[int]]], texts: Sequence[list[int]], seeds: Sequence[int]
    ) -> list[Look]:
        """After each text; ``prompts``: of each text, the prompt of each member, the base's where it has none."""

        def prefixes(member: int) -> list[list[int]]:
            return [own.get(member, own[BASE]) + text for own, text in zip(prompts, texts, strict=True)]

        hidden, logits = next_rows(self.pair.base, prefixes(BASE))
        models = {NEGATIVE: self.pair.base, **dict(enumerate(self.pair.experts, 1))}
        rows = {BASE: logits}
        for member in self._asked() - {BASE}:
            rows[member] = next_rows(models[member], prefixes(member))[1]
        return [
            self._decide(hidden[n], {member: of[n] for member, of in rows.items()}, seeds[n], len(prefix))
            for n, prefix in enumerate(prefixes(BASE))
        ]

    def _asked(self) -> set[int]:
        """Members that may be asked for a row."""
        if self.policy == "never":
            return set()
        if self.blend is None or self.blend.weights == "gate":
            return set(range(1, 1 + len(self.pair.experts)))
        weighted = {member for member, weight in self.blend.weights if weight != 0}
        return weighted | {self.blend.anchor} if self.blend.plausibility else weighted

    def _decide(self, hidden: torch.Tensor, rows: dict[int, torch.Tensor], seed: int, position: int) -> Look:
        share = probabilities(self.pair, hidden)
        deferral = 1.0 - share[0]
        if self.policy == "confidence":
            deferral = 1.0 - float(torch.softmax(rows[BASE], -1).max())
        draw = draws.uniform(seed, draws.POLICY_STREAM, position)
        likeliest = max(range(1, len(share)), key=lambda k: share[k])
        source = likeliest
        if self.policy == "sample":
            ends = torch.tensor(share[1:]).double().cumsum(0)
            source = next((k for k, end in enumerate(ends.tolist(), 1) if draw < end), BASE)
        elif not {
            "always": True,
            "never": False,
            "random": draw < self.rate,
        }.get(self.policy, deferral > self.threshold):
            source = BASE
        if source == BASE or self.blend is None:
            return Look(share, deferral, source, rows[source], {})
        weights = dict(enumerate(share)) if self.blend.weights == "gate" else dict(self.blend.weights)
        members = {member: rows[member].log_softmax(-1) for member, weight in weights.items() if weight != 0}
        return Look(share, deferral, BLEND, combine(self.blend, rows, weights), members)


@torch.inference_mode()
def decode(
    method: Method,
    prompts: Sequence[list[int]],
    max_tokens: int,
    *,
    seeds: Sequence[int] | None = None,
    others: dict[int, Sequence[list[int]]] | None = None,
    max_expert_tokens: int | None = None,
    form: Form | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    ignore_eos: bool = False,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    **adjustments: Any,
) -> list[Blended]:
    """Continue every prompt.

    Args:
        seeds: one per prompt, 0 if not given.
        others: members' own prompts, one per prompt of ``prompts``.
        max_expert_tokens: after so many tokens that the base did not write alone, it does.
        adjustments: penalties, ``logit_bias``, ``allowed_token_ids``, ``bad_words``; the prompt that counts is the
            base's.
    """
    own = [
        {BASE: prompt, **{member: texts[n] for member, texts in (others or {}).items()}}
        for n, prompt in enumerate(prompts)
    ]
    seeds = seeds or [0] * len(prompts)
    ends = (method.pair.eos, *stop_token_ids)
    done = [Blended() for _ in prompts]
    for _ in range(max_tokens):
        open_ = [n for n, one in enumerate(done) if one.finish_reason is None]
        if not open_:
            break
        looks = method.look([own[n] for n in open_], [done[n].tokens for n in open_], [seeds[n] for n in open_])
        for n, look in zip(open_, looks, strict=True):
            out = done[n]
            source, row, members = look.source, look.row, look.members
            spent = sum(other != BASE for other in out.sources)
            if max_expert_tokens is not None and source != BASE and spent >= max_expert_tokens:
                alone = Method(method.pair, policy="never").look([own[n]], [out.tokens], [seeds[n]])[0]
                source, row, members = BASE, alone.row, {}
            least = min_tokens
            if form is not None:
                allowed, complete = form(out.tokens)
                if complete and not allowed:
                    least = 0
                keep = torch.full_like(row, -torch.inf)
                ended = complete and len(out.tokens) >= least
                keep[allowed + list(ends) * ended] = 0.0
                row = row + keep  # before the log-probabilities that are reported, in vLLM too
            logits = adjusted(row, prompts[n], out.tokens, ends=ends, min_tokens=least, **adjustments)
            position = len(prompts[n]) + len(out.tokens)
            token = drawn(logits, seeds[n], position, temperature, top_p, top_k, min_p)
            out.tokens.append(token)
            out.sources.append(source)
            out.deferrals.append(look.deferral)
            out.support.append({m: float(of[token]) for m, of in members.items()} if source == BLEND else None)
            out.rows.append(row.double().log_softmax(-1))
            out.logprobs.append(float(out.rows[-1][token]))
            if len(out.tokens) >= least and (
                token in stop_token_ids or (token == method.pair.eos and (form is not None or not ignore_eos))
            ):
                out.finish_reason = "stop"
    for out in done:
        out.finish_reason = out.finish_reason or "length"
    return done


@torch.inference_mode()
def scores(method: Method, tokens: list[int], begin: int = 1) -> list[float]:
    """log P(token) of each token from ``begin`` on, teacher-forced: by the blend, or whatever writes at its position.

    With the policy "sample" and no blend: the marginal over the gate, log of the sum of P(Z = k) P_k(token).
    """
    assert begin > 0
    places = range(begin, len(tokens))
    if method.policy == "sample":
        assert method.blend is None
        method = Method(method.pair, Blend("mixture", "gate"))
    looks = method.look([{BASE: tokens[:at]} for at in places], [[] for _ in places], [0 for _ in places])
    return [float(look.row.double().log_softmax(-1)[tokens[at]]) for at, look in zip(places, looks, strict=True)]


def regex_form(pattern: str, pieces: Sequence[str | None]) -> Form:
    """A form by a regular expression; ``pieces``: the text of each token, None for what is no text."""
    import regex

    compiled = regex.compile(pattern)

    def form(written: list[int]) -> tuple[list[int], bool]:
        text = "".join(pieces[token] or "" for token in written)
        allowed = [
            token
            for token, piece in enumerate(pieces)
            if piece and compiled.fullmatch(text + piece, partial=True) is not None
        ]
        return allowed, compiled.fullmatch(text) is not None

    return form

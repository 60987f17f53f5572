"""The oracle: a plain float32 loop over Hugging Face models that says what joint greedy decoding is.

Written from the method's definition and from vLLM's documented sampling parameters; shares no code with the engine.
Recomputes the whole prefix for every token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch


@dataclass
class Pair:
    """A base, its experts and the gate, as Hugging Face models in float32."""

    base: Any
    experts: list[Any]
    theta: torch.Tensor  # [K, d]
    bias: torch.Tensor  # [K]
    eos: int
    regret: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of a linear regret artifact with the feature "margin" that looks back after REGRET_AHEAD tokens."""


REGRET_AHEAD = 3


@dataclass
class Written:
    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    deferrals: list[float] = field(default_factory=list)
    finish_reason: str = "length"
    vetoed: list[int] = field(default_factory=list)
    confidences: list[tuple[float, float | None]] = field(default_factory=list)
    """The base's top probability and, where one was asked, the expert's."""
    own: list[int] = field(default_factory=list)
    """What the base would have written at each position."""
    regretted: list[int] = field(default_factory=list)
    regrets: list[float] = field(default_factory=list)
    """How much each disputed token was regretted that was looked back at; of those taken back, too."""


def hidden_and_logits(model: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden state [d] after the final norm, and logits [V], after ``tokens``."""
    hidden = model.base_model(input_ids=torch.tensor([tokens]), use_cache=False)[0][0, -1]
    return hidden.float(), model.get_output_embeddings()(hidden).float()


def probabilities(pair: Pair, hidden: torch.Tensor) -> list[float]:
    """P(Z = k) for k = 0..K."""
    scores = [0.0, *(pair.theta @ hidden + pair.bias).tolist()]
    top = max(scores)
    raised = [math.exp(score - top) for score in scores]
    return [value / sum(raised) for value in raised]


def adjusted(
    logits: torch.Tensor,
    prompt: list[int],
    written: list[int],
    *,
    ends: tuple[int, ...],
    min_tokens: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: dict[int, float] | None = None,
    allowed_token_ids: tuple[int, ...] | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> torch.Tensor:
    """Logits [V] after all that also greedy decoding heeds; ``ends`` cannot be written before ``min_tokens``."""
    logits = logits.clone()
    for token, value in (logit_bias or {}).items():
        logits[token] += value
    if allowed_token_ids is not None:
        mask = torch.full_like(logits, -torch.inf)
        mask[list(allowed_token_ids)] = 0.0
        logits = logits + mask
    for *before, last in bad_words:
        # Only what was written counts, not the prompt (vLLM's documentation of bad_words).
        if before == written[len(written) - len(before) :]:
            logits[last] = -torch.inf
    if len(written) < min_tokens:
        logits[list(ends)] = -torch.inf
    # Repetition counts prompt and output, presence and frequency only the output (vLLM's documentation).
    for token in {*prompt, *written}:
        logits[token] = logits[token] / repetition_penalty if logits[token] > 0 else logits[token] * repetition_penalty
    for token, count in Counter(written).items():
        logits[token] -= frequency_penalty * count + presence_penalty
    return logits


@torch.inference_mode()
def greedy(
    pair: Pair,
    prompt: list[int],
    max_tokens: int,
    *,
    policy: str = "threshold",
    threshold: float = 0.5,
    max_expert_tokens: int | None = None,
    ignore_eos: bool = False,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: dict[int, float] | None = None,
    allowed_token_ids: tuple[int, ...] | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
    veto: float = 0.0,
    taken_back: Container[int] = (),
    see: Callable[[Any, list[int]], tuple[torch.Tensor, torch.Tensor]] = hidden_and_logits,
) -> Written:
    """Decode one prompt, token by token; the base writes where an expert's token is taken back."""
    out = Written()
    while len(out.tokens) < max_tokens:
        tokens = prompt + out.tokens
        hidden, logits = see(pair.base, tokens)
        share = probabilities(pair, hidden)
        deferral = 1.0 - share[0]
        base_logits = logits
        base_sure, expert_sure = float(torch.softmax(logits, -1).max()), None
        if policy == "confidence":
            deferral = 1.0 - float(torch.softmax(logits, -1).max())
        defer = {"threshold": deferral > threshold, "confidence": deferral > threshold}.get(policy, policy == "always")
        if max_expert_tokens is not None and sum(map(bool, out.sources)) >= max_expert_tokens:
            defer = False
        source = 0
        if defer:
            source = max(range(1, len(share)), key=lambda k: share[k])
            _, own = see(pair.experts[source - 1], tokens)
            expert_sure = float(torch.softmax(own, -1).max())
            if expert_sure < veto:
                out.vetoed.append(len(out.tokens))
                source = 0
            else:
                logits = own
        if len(out.tokens) in taken_back:
            out.regretted.append(len(out.tokens))
            source, logits = 0, base_logits
        heeded = partial(
            adjusted,
            prompt=prompt,
            written=out.tokens,
            ends=(pair.eos, *stop_token_ids),
            min_tokens=min_tokens,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            logit_bias=logit_bias,
            allowed_token_ids=allowed_token_ids,
            bad_words=bad_words,
        )
        token = int(heeded(logits).argmax())
        out.own.append(int(heeded(base_logits).argmax()))
        out.tokens.append(token)
        out.sources.append(source)
        out.deferrals.append(deferral)
        out.confidences.append((base_sure, expert_sure))
        if len(out.tokens) >= min_tokens and (token in stop_token_ids or (token == pair.eos and not ignore_eos)):
            out.finish_reason = "stop"
            break
    return out


def regretting(pair: Pair, prompt: list[int], max_tokens: int, regret: float, **how: Any) -> Written:
    """Decode one prompt; experts' tokens that are regretted more than ``regret`` are taken back.

    Disputed positions are looked at in order, each once. The text is written from its beginning again when one is cut.
    """
    taken_back: set[int] = set()
    standing: set[int] = set()
    regrets: list[float] = []
    seen: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def see(model: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        key = (id(model), *tokens)
        if key not in seen:
            seen[key] = hidden_and_logits(model, tokens)
        return seen[key]

    while True:
        out = greedy(pair, prompt, max_tokens, taken_back=taken_back, see=see, **how)
        disputed = [
            index
            for index, (token, own, source) in enumerate(zip(out.tokens, out.own, out.sources, strict=True))
            if source and token != own and index not in standing and index >= how.get("min_tokens", 0)
        ]
        for index in disputed:
            regrets.append(_regret(pair, prompt, out, index))
            if regrets[-1] > regret:
                taken_back.add(index)
                break
            standing.add(index)
        else:
            out.regrets = regrets
            return out


@torch.inference_mode()
def _regret(pair: Pair, prompt: list[int], out: Written, index: int) -> float:
    last = min(index + REGRET_AHEAD, len(out.tokens) - 1)
    hidden, logits = hidden_and_logits(pair.base, prompt + out.tokens[:last])
    first, second = logits.log_softmax(-1).topk(2).values.tolist()
    between = [sure for place in range(index + 1, last) if (sure := out.confidences[place][1]) is not None]
    base, expert = out.confidences[index]
    assert expert is not None
    numbers = [base, expert, out.confidences[last][0], min(between, default=1.0)]
    inside = torch.tensor(numbers, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    inputs = torch.cat([hidden, torch.tensor([first - second])])
    total = pair.regret["theta"][0] @ inputs + pair.regret["bias"][0] + pair.regret["numbers"].double() @ inside.logit()
    return float(torch.sigmoid(total))


@torch.inference_mode()
def next_token_distributions(pair: Pair, prompt: list[int]) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    """P_base [V], each P_expert [V], and P(Z = k), after ``prompt``."""
    hidden, logits = hidden_and_logits(pair.base, prompt)
    experts = [torch.softmax(hidden_and_logits(expert, prompt)[1], -1) for expert in pair.experts]
    return torch.softmax(logits, -1), experts, probabilities(pair, hidden)

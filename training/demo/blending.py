"""Blends offline: a batch of prompts through several models at once, one combined row of logits for each.

For experiments on quality. What is served is combined in the engine's lanes; here is no scheduler, no sampling
parameter but the temperature, and every model computes every token, asked or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

Rows = Mapping[str, torch.Tensor]
"""Each model's logits [B, V] after the same texts."""
Rule = Callable[[Rows, torch.Tensor], torch.Tensor]
"""Rows, and the first model's last hidden states [B, d] -> what is written from, as logits [B, V]."""


def alone(name: str) -> Rule:
    """One model writes."""
    return lambda rows, _hidden: rows[name]


def mixture(weights: Mapping[str, float]) -> Rule:
    """log of the sum of w_i P_i; the weights sum to 1."""

    def rule(rows: Rows, _hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([math.log(w) + rows[name].log_softmax(-1) for name, w in weights.items()]).logsumexp(0)

    return rule


def product(weights: Mapping[str, float], *, anchor: str = "", plausibility: float = 0.0) -> Rule:
    """The sum of w_i z_i, where the anchor's probability is at least ``plausibility`` times its greatest."""

    def rule(rows: Rows, _hidden: torch.Tensor) -> torch.Tensor:
        total = torch.stack([weight * rows[name] for name, weight in weights.items()]).sum(0)
        if not plausibility:
            return total
        of = rows[anchor]
        return torch.where(of < of.amax(-1, keepdim=True) + math.log(plausibility), of - 1e4, total)

    return rule


def union(weights: Mapping[str, float], top: int) -> Rule:
    """The mixture of each member's softmax over the union of all members' ``top`` most probable tokens."""

    def rule(rows: Rows, hidden: torch.Tensor) -> torch.Tensor:
        inside = torch.zeros_like(next(iter(rows.values())), dtype=torch.bool)
        for name in weights:
            inside.scatter_(-1, rows[name].topk(top).indices, True)
        return mixture(weights)({name: rows[name].masked_fill(~inside, -torch.inf) for name in weights}, hidden)

    return rule


@torch.inference_mode()
def write(
    models: Mapping[str, PreTrainedModel],
    rule: Rule,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[list[int]], list[float]]:
    """Continue every prompt, in one batch; EOS, if one came, is the last token.

    Returns:
        The tokens, and the sum of their log-probabilities in the rows that they were taken from.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[eos] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    caches = {name: DynamicCache() for name in models}
    open_ = torch.arange(len(prompts))
    written: list[list[int]] = [[] for _ in prompts]
    scores = [0.0] * len(prompts)
    for _ in range(max_tokens):
        positions = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        rows: dict[str, torch.Tensor] = {}
        hidden = torch.empty(0)
        for name, model in models.items():
            body: Any = model.base_model
            states = body(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions,
                past_key_values=caches[name],
                use_cache=True,
            )[0][:, -1]
            if not rows:
                hidden = states
            rows[name] = model.get_output_embeddings()(states)
        logprobs_BV = rule(rows, hidden).log_softmax(-1)
        if temperature:
            shares = (logprobs_BV / temperature).softmax(-1)
            tokens = torch.multinomial(shares, 1, generator=generator)[:, 0]
        else:
            tokens = logprobs_BV.argmax(-1)
        for row, (place, token) in enumerate(zip(open_.tolist(), tokens.tolist(), strict=True)):
            written[place].append(token)
            scores[place] += float(logprobs_BV[row, token])
        left = (tokens != eos).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) < len(open_):
            open_, tokens, mask_BT = open_[left], tokens[left], mask_BT[left]
            for cache in caches.values():
                cache.batch_select_indices(left)
        ids_BT = tokens[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
    return written, scores


def best_of(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: int, *, max_tokens: int, eos: int, seed: int
) -> list[list[int]]:
    """Of so many answers sampled at temperature 1, the one that the model itself finds most probable."""
    found, scores = write(
        {"model": model},
        alone("model"),
        [prompt for prompt in prompts for _ in range(samples)],
        max_tokens=max_tokens,
        eos=eos,
        temperature=1.0,
        seed=seed,
    )
    groups = [range(n * samples, (n + 1) * samples) for n in range(len(prompts))]
    return [found[max(group, key=lambda at: scores[at])] for group in groups]

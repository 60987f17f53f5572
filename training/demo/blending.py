"""Blends offline: a batch of prompts through several models at once, one combined row of logits for each.

For experiments on quality. What is served is combined in the engine's lanes; here is no scheduler, no sampling
parameter but the temperature, and every model computes every token, asked or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from engine.blends import Blend, BlendKind
from engine.vllm_hooks.blend import combine

Rows = Mapping[str, torch.Tensor]
"""Each model's logits [B, V] after the same texts."""
Rule = Callable[[Rows, torch.Tensor], torch.Tensor]
"""Rows, and the first model's last hidden states [B, d] -> what is written from, as logits [B, V]."""


def alone(name: str) -> Rule:
    """One model writes."""
    return lambda rows, _hidden: rows[name]


def blend(kind: BlendKind, weights: Mapping[str, float], *, anchor: str | None = None, **options: Any) -> Rule:
    """A blend as the engine computes it, see :mod:`engine.blends`.

    Args:
        anchor: of a product, if it has a plausibility.
        options: further fields of :class:`engine.blends.Blend`.
    """
    names = list(weights)
    if anchor is not None:
        options["anchor"] = names.index(anchor)
    served = Blend(kind, tuple(enumerate(weights.values())), **options)
    return lambda rows, _hidden: combine(torch.stack([rows[name] for name in names]), served).logits_AV


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

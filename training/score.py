"""Teacher-forced scoring: what base and expert would write at every token of gold completions.

Shapes: B examples, T tokens, V vocabulary, d hidden size, N completion tokens of all examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from training.hf import hidden_and_logits


@dataclass(frozen=True)
class TokenExample:
    """A prompt and its gold completion as token ids, with the EOS if that is to be learned."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Scores:
    """One row for every completion token, example after example.

    ``hidden`` [N, d] float32 is the base's hidden state from which the token is predicted,
    after the final norm; ``gold``, ``base_top`` and ``expert_top`` [N] are token ids: the right
    one, and each model's argmax. This is the cache from which gates are trained.
    """

    hidden: torch.Tensor
    gold: torch.Tensor
    base_top: torch.Tensor
    expert_top: torch.Tensor


def padded(batch: Sequence[TokenExample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and a mask [B, T] of the positions from which a completion token is predicted.

    Padding stands on the right, where a causal model does not see it.
    """
    longest = max(len(e.prompt) + len(e.completion) for e in batch)
    tokens_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    predicting_BT = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids = example.prompt + example.completion
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        predicting_BT[row, len(example.prompt) - 1 : len(ids) - 1] = True
    return tokens_BT, predicting_BT


@torch.no_grad()
def score_completions(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    examples: Sequence[TokenExample],
    batch_size: int = 32,
) -> Scores:
    """Score the completions of ``examples``; both models read the same ids, so share a vocabulary.

    Raises:
        ValueError: an example with an empty prompt or completion.
    """
    if any(not e.prompt or not e.completion for e in examples):
        raise ValueError("an example has an empty prompt or completion")
    parts: list[tuple[torch.Tensor, ...]] = []
    starts = range(0, len(examples), batch_size)
    for start in tqdm(starts, desc="score", unit="batch", leave=False):
        batch = examples[start : start + batch_size]
        tokens_BT, predicting_BT = padded(batch)
        hidden_BTD, base_BTV = hidden_and_logits(base, tokens_BT)
        _, expert_BTV = hidden_and_logits(expert, tokens_BT)
        parts.append(
            (
                hidden_BTD[predicting_BT].float(),
                tokens_BT.roll(-1, dims=1)[predicting_BT],
                base_BTV[predicting_BT].argmax(-1),
                expert_BTV[predicting_BT].argmax(-1),
            )
        )
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))

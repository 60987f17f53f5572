"""Scores of an expert whose vocabulary is not the base's: its own tokens, and what they say of the base's.

The expert reads the text in its own tokens; the probability of a base token is the ratio of two prefix masses
(:mod:`engine.spelling.scores`). Where none of its tokens ends at a position it is never asked when the pair is served:
there the gate learns nothing, since the base writes whatever the gate says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from engine.spelling.mass import Mass
from engine.spelling.scores import score_foreign
from engine.spelling.speller import Speller
from engine.spelling.words import begins_word
from training.checkpoints import forward
from training.data import Example, TokenExample
from training.scoring import padded

_LOOK_BACK = 8
"""Bytes of the text that tell whether a word begins after them."""


@dataclass(frozen=True)
class SpelledExample:
    """An example as an expert with a vocabulary of its own reads it.

    Attributes:
        tokens: the prompt and the completion, without an end, in its own tokens.
        pieces: the completion in the base's tokens, by their bytes.
        gold: the base's tokens, with the end if that is to be learned.
    """

    tokens: TokenExample
    pieces: list[bytes]
    gold: list[int]


def spelled(
    examples: Sequence[Example], tokens: Sequence[TokenExample], base: Speller, expert: Speller, tokenizer: Any
) -> list[SpelledExample]:
    """Examples in an expert's own tokens.

    Args:
        tokens: the examples in the base's.
        tokenizer: the expert's, for prompts.
    """
    found = []
    for example, of_base in zip(examples, tokens, strict=True):
        ids = of_base.completion[:-1] if example.complete else of_base.completion
        pieces = [base.vocabulary.bytes_of(token) or b"" for token in ids]
        own = TokenExample(example.prompt_ids(tokenizer), expert.spell(b"".join(pieces)))
        found.append(SpelledExample(own, pieces, of_base.completion))
    return found


@torch.no_grad()
def score_spelled_shard(
    model: PreTrainedModel, examples: Sequence[SpelledExample], batch_size: int, base: Speller, expert: Speller
) -> dict[str, torch.Tensor]:
    """Score one shard: "logp" of the base's tokens, "top" (the gold token where the expert goes on like the text, else
    -1) and "aligned" (whether it may be asked there), in the order of the examples.
    """
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        # One token more, which no position sees, so that the last position predicts too.
        longer = [TokenExample(e.tokens.prompt, [*e.tokens.completion, 0]) for e in batch]
        tokens_BT, where_BT = (tensor.to(model.device) for tensor in padded(longer))
        _, logits_BTV = forward(model, tokens_BT)
        sizes = [len(example.completion) for example in longer]
        for example, logits_NV in zip(batch, torch.split(logits_BTV[where_BT].float().cpu(), sizes), strict=True):
            parts.append(_score(example, torch.softmax(logits_NV, -1).numpy(), base, expert))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _score(
    example: SpelledExample,
    probabilities_NV: NDArray[np.float32],
    base: Speller,
    expert: Speller,
) -> dict[str, torch.Tensor]:
    ends = len(example.gold) > len(example.pieces)
    text = b"".join(example.pieces)
    scores = score_foreign(
        expert, text, example.pieces, ends, lambda place: Mass(expert.vocabulary, probabilities_NV[place])
    )
    begins, at = [], 0
    for piece in [*example.pieces, *([b""] if ends else [])]:
        begins.append(begins_word(base.boundaries, text[max(at - _LOOK_BACK, 0) : at], piece))
        at += len(piece)
    aligned_N = torch.from_numpy(scores.aligned) & torch.tensor(begins)
    right_N = torch.from_numpy(scores.right) & aligned_N
    return {
        "logp": torch.from_numpy(scores.logp),
        "top": torch.where(right_N, torch.tensor(example.gold), -1),
        "aligned": aligned_N,
    }

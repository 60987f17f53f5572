"""The plain loop that says what joint decoding is: two Hugging Face models, one gate, no tricks.

It recomputes the whole prefix for every token. Everything cleverer is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from training.hf import hidden_and_logits

BASE = "base"
EXPERT = "expert"


@dataclass(frozen=True)
class JointOutput:
    """What was decoded. The three lists have the same length; an EOS is the last token, if any.

    ``probabilities`` holds the gate's probability that the expert writes the token;
    ``sources`` holds who did, ``BASE`` or ``EXPERT``.
    """

    tokens: list[int]
    sources: list[str]
    probabilities: list[float]

    @property
    def deferral_rate(self) -> float:
        """Expert tokens / completion tokens."""
        return self.sources.count(EXPERT) / max(1, len(self.sources))


@torch.inference_mode()
def joint_greedy(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    theta: torch.Tensor,
    bias: torch.Tensor,
    threshold: float,
    prompt_ids: Sequence[int],
    max_tokens: int,
) -> JointOutput:
    """Decode greedily; the expert writes a token where the gate's probability is > ``threshold``.

    ``theta`` is [1, d] and ``bias`` is [1], of one expert. A threshold of 1 never
    defers, one below 0 always does. Stops after the EOS of ``base`` or ``max_tokens`` tokens.

    Raises:
        ValueError: an empty prompt, or a gate for several experts.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty: there is no hidden state to start from")
    if theta.shape[0] != 1:
        raise ValueError(f"the gate has {theta.shape[0]} experts; this loop decodes with one")
    ids = list(prompt_ids)
    output = JointOutput([], [], [])
    while len(output.tokens) < max_tokens:
        tokens_BT = torch.tensor([ids])
        hidden_BTD, logits_BTV = hidden_and_logits(base, tokens_BT)
        probability = float(torch.sigmoid(hidden_BTD[0, -1].float() @ theta[0] + bias[0]))
        defer = probability > threshold
        if defer:
            _, logits_BTV = hidden_and_logits(expert, tokens_BT)
        token = int(logits_BTV[0, -1].argmax())
        ids.append(token)
        output.tokens.append(token)
        output.sources.append(EXPERT if defer else BASE)
        output.probabilities.append(probability)
        if token == base.config.eos_token_id:
            break
    return output

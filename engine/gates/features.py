"""What the base's own next-token distribution says of how sure it is. Shapes: B rows, V vocabulary, F features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_RANKED = 5
FEATURES: tuple[str, ...] = ("entropy", "margin", *(f"logprob_{rank}" for rank in range(1, _RANKED + 1)))
"""Names of all features, in natural logarithms: entropy of the distribution; log-probability of the most probable
token less that of the second; log-probabilities of the five most probable tokens. At temperature 1, before penalties,
biases and grammars."""

_LEAST = -30.0
"""Less probable than this is as good as impossible: keeps features finite where the model rules a token out."""


def distribution_features(names: Sequence[str], logits_BV: torch.Tensor) -> torch.Tensor:
    """Features [B, F] in float32, in the order of ``names``.

    Args:
        logits_BV: over the real vocabulary: no masked columns.
    """
    logits_BV = logits_BV.float()
    total_B1 = torch.logsumexp(logits_BV, dim=1, keepdim=True)
    ranked = min(_RANKED, logits_BV.shape[1])
    top_BR = (torch.topk(logits_BV, ranked, dim=1).values - total_B1).clamp(min=_LEAST)
    columns: list[torch.Tensor] = []
    for name in names:
        if name == "entropy":
            logp_BV = (logits_BV - total_B1).clamp(min=_LEAST)
            columns.append(-(logp_BV.exp() * logp_BV).sum(dim=1))
        elif name == "margin":
            columns.append(top_BR[:, 0] - top_BR[:, min(1, ranked - 1)])
        else:
            rank = int(name.removeprefix("logprob_"))
            columns.append(top_BR[:, min(rank, ranked) - 1])
    return torch.stack(columns, dim=1)

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
_CACHED = 1 << 16
"""Logits that are worked on at once on a CPU."""
_BLOCK = 256
"""Columns of which the greatest is found first, so that ranking looks at few of them."""


def distribution_features(names: Sequence[str], logits_BV: torch.Tensor) -> torch.Tensor:
    """Features [B, F] in float32, in the order of ``names``.

    Args:
        logits_BV: over the real vocabulary: no masked columns.
    """
    if logits_BV.device.type == "cpu":
        # A few rows at a time stay in the processor's cache, which halves the time.
        few = max(1, _CACHED // logits_BV.shape[1])
        return torch.cat([_features(names, rows_BV) for rows_BV in torch.split(logits_BV, few)])
    return _features(names, logits_BV)


def _features(names: Sequence[str], logits_BV: torch.Tensor) -> torch.Tensor:
    ranked_BR = _greatest(logits_BV, _RANKED)
    # Relative to the most probable token: nothing overflows, and what is ruled out stays finite.
    below_BV = (logits_BV.float() - ranked_BR[:, :1]).clamp_(min=2 * _LEAST)
    raised_BV = below_BV.exp()
    total_B = raised_BV.sum(dim=1)
    top_BR = (ranked_BR - ranked_BR[:, :1] - total_B.log()[:, None]).clamp(min=_LEAST)
    ranks = top_BR.shape[1]
    columns: list[torch.Tensor] = []
    for name in names:
        if name == "entropy":
            columns.append(total_B.log() - (raised_BV * below_BV).sum(dim=1) / total_B)
        elif name == "margin":
            columns.append(top_BR[:, 0] - top_BR[:, min(1, ranks - 1)])
        else:
            rank = int(name.removeprefix("logprob_"))
            columns.append(top_BR[:, min(rank, ranks) - 1])
    return torch.stack(columns, dim=1)


def _greatest(logits_BV: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` greatest of each row (all, if there are fewer), in order, in float32.

    They are among the blocks with the ``count`` greatest maxima, and those are found in one pass that vectorises well.
    """
    blocks = logits_BV.shape[1] // _BLOCK
    if blocks <= count:
        return logits_BV.float().topk(min(count, logits_BV.shape[1]), dim=1).values
    whole = blocks * _BLOCK
    blocks_BNC = logits_BV[:, :whole].view(len(logits_BV), blocks, _BLOCK)
    best_BR1 = blocks_BNC.amax(dim=2).topk(count, dim=1).indices[:, :, None]
    candidates_BC = blocks_BNC.gather(1, best_BR1.expand(-1, -1, _BLOCK)).flatten(1)
    return torch.cat([candidates_BC, logits_BV[:, whole:]], dim=1).float().topk(count, dim=1).values

"""The marginal likelihood: who wrote each token is summed out. The method's loss (arXiv 2403.03870, section 3)."""

import torch

from training.losses.tokens import Tokens


def marginal(tokens: Tokens, positive_weight: float = 1.0) -> torch.Tensor:
    """Mean over N of -log sum_k P(Z = k) P_k(gold); Z depends on the text alone, so the sum over all Z factorises."""
    written_NZ = torch.cat([tokens.base_logp_N[:, None], tokens.expert_logp_NK], dim=1)
    return -torch.logsumexp(tokens.log_gate() + written_NZ, dim=1).mean()

"""Log-probabilities and ranks of given tokens, in plain torch operations.

Tensor shapes are suffixes: R rows, A asked positions, G given tokens, V vocabulary, N most probable tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

_RANKED_ROWS = 64
"""Rows whose tokens are ranked at once: comparing takes 8 bytes for each of their logits."""


def gather_logprobs(logprobs_RV: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
    """What vLLM's ``Sampler.gather_logprobs`` returns, without compiling anything.

    vLLM counts ranks with a ``torch.compile``d function, for the sake of memory. The first request for logprobs then
    waits for inductor inside a step of everybody's; on a CPU that takes a C++ compiler and a cache folder to load
    libraries from, and without either the step fails, and the engine with it. Here memory is saved by counting a few
    rows at a time.

    Args:
        logprobs_RV: of each row.
        num_logprobs: most probable tokens wanted of each row.
        token_ids: the token of each row whose logprob and rank is wanted; shape [R].
    """
    top_RN, top_ids_RN = torch.topk(logprobs_RV, num_logprobs, dim=-1)
    ids_R1 = token_ids.unsqueeze(-1)
    own_R1 = logprobs_RV.gather(-1, ids_R1)
    pairs = zip(logprobs_RV.split(_RANKED_ROWS), own_R1.split(_RANKED_ROWS), strict=True)
    return LogprobsTensors(
        torch.cat((ids_R1, top_ids_RN), dim=1).to(torch.int32),
        torch.cat((own_R1, top_RN), dim=1),
        torch.cat([(rows_RV >= rows_R1).sum(-1) for rows_RV, rows_R1 in pairs]),
    )


def score(logits_AV: torch.Tensor, rows: Sequence[int], tokens_G: torch.Tensor, num_logprobs: int) -> SamplerOutput:
    """What a sampler would say of rows in which these tokens were drawn.

    Args:
        rows: of the given tokens.
        tokens_G: int64, on the logits' device.
        num_logprobs: most probable tokens wanted of each row.
    """
    rows_G = torch.tensor(rows, device=logits_AV.device)
    logprobs_GV = logits_AV[rows_G].log_softmax(dim=-1, dtype=torch.float32)
    tokens_G1 = tokens_G.to(torch.int32).unsqueeze(-1)
    return SamplerOutput(tokens_G1, gather_logprobs(logprobs_GV, num_logprobs, tokens_G))


def write_over(output: SamplerOutput, scored: SamplerOutput, rows: list[int]) -> None:
    """Put scored rows in the place of drawn ones; both have as many columns of log-probabilities."""
    assert output.logprobs_tensors is not None
    assert scored.logprobs_tensors is not None
    rows_G = torch.tensor(rows, device=output.sampled_token_ids.device)
    output.sampled_token_ids[rows_G] = scored.sampled_token_ids.to(output.sampled_token_ids.dtype)
    for drawn, of_given in zip(output.logprobs_tensors[:3], scored.logprobs_tensors[:3], strict=True):
        drawn[rows_G] = of_given.to(drawn.dtype)

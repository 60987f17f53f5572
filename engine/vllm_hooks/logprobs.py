"""vLLM's tables of log-probabilities as the engine's own types."""

from __future__ import annotations

from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from engine.types import TokenLogprobs


def row_logprobs(rows: LogprobsLists | None, row: int, count: int | None) -> TokenLogprobs | None:
    """Of one sample; ``count`` is how many probable tokens its request asked for, None is no log-probabilities."""
    if rows is None or count is None:
        return None
    # A batch carries as many columns as its greediest row asked for.
    columns = slice(0, count + 1)
    return TokenLogprobs(
        rows.logprob_token_ids[row, columns].tolist(),
        rows.logprobs[row, columns].tolist(),
        int(rows.sampled_token_ranks[row]),
    )


def prompt_logprobs(tensors: LogprobsTensors) -> list[TokenLogprobs]:
    """Of a prompt's tokens, from the second on."""
    return [
        TokenLogprobs(token_ids, logprobs, rank)
        for token_ids, logprobs, rank in zip(
            tensors.logprob_token_ids.tolist(),
            tensors.logprobs.tolist(),
            tensors.selected_token_ranks.tolist(),
            strict=True,
        )
    ]

"""The reference code's method as a baseline: one HTTP request per token to two stock servers, whole prefix each time.

Kinder than the original: prefix caching is on, no logprobs are asked for (the original asks for those of the whole
vocabulary), connections are kept, and nothing is computed between requests.
"""

from __future__ import annotations

from bench.account import Account
from bench.contenders.base import Stamp
from bench.contenders.stock import MODEL
from bench.errors import BenchError
from bench.http_client import Connection, Pool
from bench.services import HOST, HttpService
from bench.workload import Cell, Job, Sampling
from engine import draws


def defers(job: Job, position: int) -> bool:
    """Whether the engine's ``random`` policy would defer this position.

    Args:
        position: number of tokens before the one to be written, prompt included.
    """
    if job.deferral == "gate":
        raise ValueError("the gate's decisions are not known without the base's hidden state")
    return draws.uniform(job.seed, draws.POLICY_STREAM, position) < job.deferral


class PerTokenHttp:
    """See the module's docstring; :class:`~bench.contenders.base.Contender` for the contract."""

    name = "per-token HTTP"
    slow = True

    def __init__(self, base: HttpService, expert: HttpService) -> None:
        self._base, self._expert = base, expert
        self.services = (base, expert)
        self._pools = (Pool(HOST, 0), Pool(HOST, 0))

    def takes(self, cell: Cell) -> bool:
        """Forced deferrals only."""
        return cell.deferral != "gate"

    async def open(self) -> None:
        """Connections are made anew: the servers may have closed idle ones."""
        self._pools = (Pool(HOST, self._base.port), Pool(HOST, self._expert.port))

    async def run(self, job: Job, stamp: Stamp) -> int:
        """Complete one job: ask the base at every position (a gate would need it), then the expert where deferred."""
        tokens = list(job.prompt)
        end = len(tokens) + job.max_tokens
        base, expert = self._pools
        while len(tokens) < end:
            token = await _next_token(base, tokens, job.sampling)
            if defers(job, len(tokens)):
                token = await _next_token(expert, tokens, job.sampling)
            tokens.append(token)
            stamp()
        return len(tokens) - len(job.prompt)

    def account(self) -> Account | None:
        """There is none."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        for pool in self._pools:
            await pool.close()


async def _next_token(pool: Pool, tokens: list[int], sampling: Sampling) -> int:
    body = {
        "model": MODEL,
        "prompt": tokens,
        "max_tokens": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    connection: Connection
    with pool.connection() as connection:
        answer = await connection.post("/v1/completions", body)
    token_ids = answer["choices"][0]["token_ids"]
    if len(token_ids) != 1:
        raise BenchError(f"a stock server wrote {len(token_ids)} tokens instead of one")
    return int(token_ids[0])

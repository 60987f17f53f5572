"""vLLM's own OpenAI server with one member of the pair, or with the base as the expert's draft model.

That is what a user serves who does without the other, or who wants the expert's text and no other, sooner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from bench.account import Account
from bench.contenders.base import Stamp
from bench.http_client import Pool
from bench.services import HOST, HttpService, stream_completion, write_completion
from bench.settings import Settings
from bench.shapes import Member
from bench.workload import Cell, Job

MODEL = "stock"


def stock_service(
    name: str, member: Member, settings: Settings, cores: Sequence[int] = (), *, draft: Member | None = None
) -> HttpService:
    """A stock server. Whatever is not common to all contenders is left at vLLM's defaults (prefix caching is on).

    Args:
        cores: on a CPU, those of its worker. None given: vLLM chooses, which on a small machine is the same one for
            every server.
        draft: a smaller model of the same vocabulary, which guesses ``settings.draft_tokens`` tokens at a time.
    """
    options = {
        "model": str(member.path),
        "served_model_name": MODEL,
        "kv_cache_memory_bytes": settings.kv_bytes(member, draft),
        "max_num_seqs": settings.max_num_seqs,
        # What the logs would cost is no merit of ours.
        "uvicorn_log_level": "warning",
        "disable_uvicorn_access_log": True,
        "disable_log_stats": True,
        **settings.engine_options(member, draft),
    }
    if draft is not None:
        options["speculative_config"] = json.dumps(
            {"method": "draft_model", "model": str(draft.path), "num_speculative_tokens": settings.draft_tokens}
        )
    arguments = ["-m", "vllm.entrypoints.openai.api_server"]
    for option, value in options.items():
        flag = option.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if settings.cuda:
        # As in our own lanes: FlashInfer compiles its sampler while vLLM starts, and without nvcc vLLM does not start.
        env["VLLM_USE_FLASHINFER_SAMPLER"] = os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if cores and not settings.cuda:
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return HttpService(name, arguments, "/health", settings, env)


class Stock:
    """See the module's docstring; :class:`~bench.contenders.base.Contender` for the contract.

    Args:
        deferral: at which this member alone does the work of the pair: 0 for the base, 1 for the expert.
    """

    slow = False

    def __init__(self, name: str, service: HttpService, deferral: float) -> None:
        self.name = name
        self._service = service
        self._deferral = deferral
        self.services = (service,)
        self._pool = Pool(HOST, 0)

    def takes(self, cell: Cell) -> bool:
        """Deferral means nothing to one model alone; it is measured once, where the pair does as much or more."""
        return cell.deferral == self._deferral

    async def open(self) -> None:
        """Connections are made anew: the server may have closed idle ones."""
        self._pool = Pool(HOST, self._service.port)

    async def run(self, job: Job, stamp: Stamp) -> int:
        """Complete one job."""
        body = {
            "model": MODEL,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": job.sampling.temperature,
            "top_p": job.sampling.top_p,
            "ignore_eos": True,
        }
        return await stream_completion(self._pool, body, stamp)

    async def text(self, prompt: Sequence[int], max_tokens: int) -> str:
        """What it writes, to its end."""
        return await write_completion(self._pool, {"model": MODEL, "prompt": list(prompt), "max_tokens": max_tokens})

    def account(self) -> Account | None:
        """There is none."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

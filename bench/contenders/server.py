"""This project's server, over HTTP with streaming."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from bench.account import Account
from bench.contenders.base import Stamp
from bench.contenders.engine_alone import engine_config
from bench.http_client import Pool
from bench.services import HOST, HttpService, stream_completion, write_completion
from bench.settings import Settings
from bench.workload import Cell, Job

MODEL = "collm"


def server_service(settings: Settings) -> HttpService:
    """The server's process; its configuration travels in environment variables."""
    config = engine_config(settings).model_dump(mode="json", exclude_none=True)
    config["server"] = {"access_log": False, "log_level": "warning"}
    config["served_model_name"] = MODEL
    env = {
        f"COLLM_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in config.items()
    }
    for name in os.environ:
        if name.startswith("COLLM_") and name not in env:
            raise ValueError(f"the environment has {name}, which would change what is measured: unset it")
    return HttpService("server", ["-m", "server"], "/ready", settings, env)


class Server:
    """See the module's docstring; :class:`~bench.contenders.base.Contender` for the contract."""

    name = "server"
    slow = False

    def __init__(self, service: HttpService) -> None:
        self._service = service
        self.services = (service,)
        self._pool = Pool(HOST, 0)

    def takes(self, cell: Cell) -> bool:
        """All cells."""
        return True

    async def open(self) -> None:
        """Connections are made anew: the server may have closed idle ones."""
        self._pool = Pool(HOST, self._service.port)

    async def run(self, job: Job, stamp: Stamp) -> int:
        """Complete one job."""
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": job.sampling.temperature,
            "top_p": job.sampling.top_p,
            "seed": job.seed,
            "ignore_eos": True,
        }
        if job.deferral != "gate":
            body["collaboration"] = {"policy": "random", "rate": job.deferral}
        return await stream_completion(self._pool, body, stamp)

    async def text(self, prompt: Sequence[int], max_tokens: int) -> str:
        """What the pair writes by its own gate, to its end."""
        return await write_completion(self._pool, {"model": MODEL, "prompt": list(prompt), "max_tokens": max_tokens})

    def account(self) -> Account | None:
        """Not seen over HTTP."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

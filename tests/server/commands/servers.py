"""Servers of stand-in lanes, started as a user starts one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.live import announced_address
from tests.packaging.sources import ROOT
from tests.server.fakes import byte_level_tokenizer
from tests.waiting import GENEROUS_SECONDS

MODEL = "collm-standin"
LANE = """model = "standin"
backend = "bench.standin"
vllm = {{ vocab_size = {vocabulary}, max_model_len = 512, step_seconds = {step_seconds} }}
"""
SERVER = """
[scheduler]
max_num_seqs = 4

[server]
port = 0
max_queued_requests = {queued}
access_log = false
api_keys = [{keys}]
playground = "{playground}"
"""


def server_of_standins(
    folder: Path,
    *,
    step_seconds: float = 0.002,
    experts: Sequence[str] = ("codes",),
    keys: Sequence[str] = (),
    queued: int = 64,
    playground: str = "open",
    more: str = "",
) -> Path:
    """Configuration and tokenizer of a server of stand-in lanes; gives the configuration's file.

    Args:
        more: tables that are added to the configuration.
    """
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    lane = LANE.format(vocabulary=tokenizer.get_vocab_size(), step_seconds=step_seconds)
    parts = [f'served_model_name = "{MODEL}"\ntokenizer = "{folder}"\n', f"[base]\n{lane}"]
    parts += [f'[[experts]]\nname = "{name}"\n{lane}' for name in experts]
    parts += [SERVER.format(queued=queued, keys=", ".join(f'"{key}"' for key in keys), playground=playground), more]
    config = folder / "collm.toml"
    config.write_text("\n".join(parts))
    return config


@contextlib.contextmanager
def standins(folder: Path, **options: Any) -> Iterator[str]:
    """A server of stand-in lanes, for as long as the context; gives its address. Options as above."""
    config = server_of_standins(folder, **options)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COLLM_")}
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "--config", str(config)], cwd=ROOT, env=environment, stdout=out, stderr=out
        )
    try:
        yield announced_address(process, log, GENEROUS_SECONDS)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

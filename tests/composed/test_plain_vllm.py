"""vLLM's own server serves a composed checkpoint: nothing but the installed package tells it how."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import httpx
import pytest

from tests.composed import one_lane
from tests.composed.reference import Reference
from tests.waiting import eventually

COUNT = 8


def test_the_entry_point_is_installed() -> None:
    names = [point.value for point in entry_points(group="vllm.general_plugins")]
    assert "engine.composed.register:register" in names


@pytest.mark.slow
def test_plain_server(composed: Callable[[str], Path], tmp_path: Path) -> None:
    folder = composed("llama reads qwen2")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # What `vllm serve` runs; vLLM's CPU package has a name that its own command line does not find.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1"),
        *("--port", str(port), "--dtype", "float32", "--max-model-len", "160", "--served-model-name", "composed"),
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    # Another folder: the project is found where it is installed, not where the server is started.
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"

        def healthy() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                return httpx.get(f"{url}/health", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        eventually(healthy, seconds=300)
        prompt = one_lane.prompts()[0]
        body = {"model": "composed", "prompt": prompt, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60).json()
        assert answer["choices"][0]["token_ids"] == Reference(folder).greedy(prompt, COUNT)
    finally:
        server.terminate()
        server.wait(60)
        log.close()

"""Nothing that runs of this project is taken from the current folder, whatever lies there under the packages' names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.builders import standin_config
from tests.engine.oracle import Pair
from tests.live import announced_address
from tests.packaging.sources import ROOT
from tests.robustness.servers import DEMO, START_SECONDS
from tests.server.commands.servers import server_of_standins
from tests.waiting import GENEROUS_SECONDS

SCRIPT = """
import asyncio, sys
from engine.client import EngineClient
from engine.config import EngineConfig

async def main():
    client = await EngineClient.start(EngineConfig.model_validate_json(sys.argv[1]))
    await client.shutdown()
    print("started and ended")

asyncio.run(main())
"""


@pytest.fixture
def strays(tmp_path: Path) -> Path:
    """A folder of modules that leave a trace when they are run, and fail."""
    folder = tmp_path / "strays"
    folder.mkdir()
    for name in ("engine", "server", "training", "bench", "vllm"):
        trace = f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')"
        (folder / f"{name}.py").write_text(f"{trace}\nraise SystemExit(9)\n")
    return folder


def ran(strays: Path) -> str:
    """Names of the stray modules that were run."""
    trace = strays.parent / "ran"
    return trace.read_text() if trace.exists() else ""


def test_the_engine_s_process(strays: Path, tmp_path: Path) -> None:
    """Started by a script that lies elsewhere, as an installed command does."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script), standin_config(Pair()).model_dump_json()],
        cwd=strays, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=GENEROUS_SECONDS,
    )  # fmt: skip
    assert (ran(strays), result.returncode, result.stdout) == ("", 0, "started and ended\n"), result.stderr


def test_the_installed_command(strays: Path) -> None:
    command = Path(sys.executable).with_name("collm")
    result = subprocess.run(
        [command, "serve", "--help"], cwd=strays, capture_output=True, text=True, timeout=GENEROUS_SECONDS
    )
    assert (ran(strays), result.returncode) == ("", 0), result.stderr


def test_python_m_server(strays: Path, tmp_path: Path) -> None:
    """With ``-m`` Python itself takes ``server`` from the current folder; of all else nothing may come from there."""
    (strays / "server.py").unlink()
    config = server_of_standins(tmp_path)
    _serve(["--config", str(config)], strays, tmp_path / "log", GENEROUS_SECONDS)


@pytest.mark.slow
def test_worker_processes(strays: Path, tmp_path: Path) -> None:
    """Of vLLM, with the executor mp; vLLM starts one more process to look at a model's class."""
    (strays / "server.py").unlink()
    text = DEMO.read_text().replace('"models/', f'"{ROOT}/models/')
    config = tmp_path / "demo.toml"
    config.write_text(text)
    mp = ["--base.executor", "mp", "--server.port", "0"]
    _serve(["--config", str(config), *mp], strays, tmp_path / "log", START_SECONDS)


def _serve(arguments: list[str], strays: Path, log: Path, seconds: float) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COLLM_")}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", *arguments],
            cwd=strays, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        announced_address(process, log, seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
    assert ran(strays) == ""

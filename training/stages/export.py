"""Export: the pair to be served, in one folder, with a configuration that the server loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from training.files import write_text
from training.project import Project
from training.stages import calibrate
from training.toml import to_toml


def run(project: Project) -> None:
    """Write ``pair/``: the calibrated gate of the first seed, its base if that was trained, and ``collm.toml``."""
    seed = project.settings.seeds[0]
    if "collm" not in project.settings.train.methods:
        return
    calibrate.stage_of(project, "collm", seed).need("calibrate")
    folder = project.folder("pair")
    trained = project.base_of("collm", seed)
    base = project.base
    shutil.copytree(calibrate.folder_of(project, "collm", seed) / "gate", folder / "gate", dirs_exist_ok=True)
    if trained != project.base:
        base = folder / "base"
        shutil.copytree(trained, base, dirs_exist_ok=True)
    experts = [{"name": name, **_lane(project, path)} for name, path in project.expert_paths.items()]
    config = {"base": _lane(project, base), "experts": experts, "gate": {"path": str(folder / "gate")}}
    write_text(folder / "collm.toml", to_toml(config))
    print(f"to serve the pair: python -m server --config {folder / 'collm.toml'}")


def _lane(project: Project, model: Path) -> dict[str, Any]:
    """A lane's table, with the engine's options that it was calibrated with."""
    engine = project.settings.engine
    lane: dict[str, Any] = {"model": str(model)}
    if engine.kv_cache_memory_bytes is not None:
        lane["kv_cache_memory_bytes"] = engine.kv_cache_memory_bytes
    return lane | ({"vllm": engine.vllm} if engine.vllm else {})

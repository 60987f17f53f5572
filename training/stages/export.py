"""Export: the pair to be served, in one folder, with a configuration that the server loads."""

from __future__ import annotations

import json
import shutil

from training.files import write_text
from training.project import Project
from training.stages import calibrate


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
    lines = ["[base]", *_lane(project, str(base), "base")]
    for name, path in project.expert_paths.items():
        lines += ["", "[[experts]]", f"name = {json.dumps(name)}", *_lane(project, str(path), "experts")]
    lines += ["", "[gate]", f"path = {json.dumps(str(folder / 'gate'))}"]
    write_text(folder / "collm.toml", "\n".join(lines) + "\n")
    print(f"to serve the pair: python -m server --config {folder / 'collm.toml'}")


def _lane(project: Project, model: str, table: str) -> list[str]:
    """A lane's lines, with the engine's options that it was calibrated with. TOML reads JSON's plain values."""
    engine = project.settings.engine
    lines = [f"model = {json.dumps(model)}"]
    if engine.kv_cache_memory_bytes is not None:
        lines.append(f"kv_cache_memory_bytes = {engine.kv_cache_memory_bytes}")
    if engine.vllm:
        lines += ["", f"[{table}.vllm]", *(f"{key} = {json.dumps(value)}" for key, value in engine.vllm.items())]
    return lines

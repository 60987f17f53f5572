"""Export: the pair to be served, in one folder, with a configuration that the server loads."""

from __future__ import annotations

import shutil

import tomli_w

from engine.regret import FILES as REGRET_FILES
from training import graph
from training.files import write_text
from training.project import Project
from training.serving import expert_fields


def run(project: Project) -> None:
    """Write ``pair/``: the gate of the first seed, with a regret if one was learned, its base if that was trained, and
    ``collm.toml``.
    """
    seed = project.settings.seeds[0]
    if "collm" not in project.settings.train.methods:
        return
    calibration = graph.calibration(project, "collm", seed)
    calibration.need("calibrate")
    folder = project.folder("pair")
    gate = graph.exported_gate(project, seed)
    for name in REGRET_FILES:
        # A gate that was exported earlier may have had a regret that this one has not.
        (folder / "gate" / name).unlink(missing_ok=True)
    shutil.copytree(gate, folder / "gate", dirs_exist_ok=True)
    trained, base = project.base_of("collm", seed), project.base
    if trained.run is not None:
        base = folder / "base"
        shutil.copytree(trained.path, base, dirs_exist_ok=True)
    # The engine's options are those that the pair was calibrated with.
    adapted = project.base if trained.run is not None else None
    engine = project.settings.engine
    config = {
        "base": {"model": str(base), **engine.lane("base")},
        "experts": [expert_fields(engine, name, path, adapted) for name, path in project.expert_paths.items()],
        "gate": {"path": str(folder / "gate")},
    }
    if project.settings.data.chat_templates == "own":
        config["server"] = {"chat_templates": "own"}
    write_text(folder / "collm.toml", tomli_w.dumps(config))
    print(f"to serve the pair: collm serve --config {folder / 'collm.toml'}")

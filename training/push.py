"""``collm train push``: the model card of a trained pair, and its upload to a hub.

The gate goes to a repository of its own, which ``gate.path`` of a server's configuration may name. A trained base goes
to a second one, ``NAME-base``: whoever loads a model takes all safetensors files of its repository for its weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tomli_w

from engine.gate import FIELDS_FILE, TENSORS_FILE, GateArtifact
from engine.regret import FILES as REGRET_FILES
from training import graph
from training.errors import TrainingError
from training.files import write_text
from training.project import Project

CARD = "README.md"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def push(project: Project, to: str | None, *, private: bool = False) -> None:
    """Write the card into ``pair/gate``; with ``to``, upload gate and trained base.

    Args:
        to: OWNER/NAME on the hub.
        private: of what is made there.

    Raises:
        TrainingError: nothing is calibrated, the name is none, or the hub refuses or cannot be reached.
    """
    if to is not None and not _NAME.fullmatch(to):
        raise TrainingError(f"--to {to}: is not OWNER/NAME")
    seed = project.settings.seeds[0]
    graph.calibration(project, "collm", seed).need("calibrate")
    folder = project.folder("pair", "gate")
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder: run collm train export first")
    trained = project.base_of("collm", seed).run is not None
    write_text(folder / CARD, card(project, to))
    print(f"{folder / CARD}")
    if to is None:
        return
    _upload(folder, to, private, [FIELDS_FILE, TENSORS_FILE, *REGRET_FILES, CARD])
    print(f'gate.path = "{to}"')
    if trained:
        _upload(project.folder("pair", "base"), f"{to}-base", private, None)
        print(f'base.model = "{to}-base"')


def _upload(folder: Path, to: str, private: bool, files: list[str] | None) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(to, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=to,
            folder_path=folder,
            allow_patterns=files,
            # A gate that was pushed earlier may have had a regret that this one has not.
            delete_patterns=list(REGRET_FILES),
            commit_message="Trained by collm",
        )
    # No network, no token, no right to write: errors of several libraries.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"{to}: cannot be uploaded: {reason}; {folder} is complete and can be uploaded later"
        ) from error


def card(project: Project, to: str | None) -> str:
    """The card, in Markdown: what the pair is, how it is served, what was measured, how it was trained."""
    settings, seed = project.settings, project.settings.seeds[0]
    calibration = graph.calibration(project, "collm", seed)
    gate = GateArtifact.load(calibration.path / "gate")
    trained = project.base_of("collm", seed).run is not None
    base = settings.base.model
    served = f"{to or 'OWNER/NAME'}-base" if trained else base
    config = {
        "base": {"model": served, **settings.engine.lane("base")},
        "experts": [
            {"name": e.name, ("adapter" if e.adapter else "model"): e.source} | settings.engine.lane(e.name)
            for e in settings.experts
        ],
        "gate": {"path": to or "OWNER/NAME"},
    }
    found = calibration.results
    names = ", ".join(f"`{name}`" for name in settings.expert_names)
    kind = f"{gate.kind}" + (f" on the hidden state and {', '.join(gate.features)}" if gate.features else "")
    parts = [
        _front_matter(base, settings.train.mode),
        f"# Deferral gate: {Path(base).name} with {', '.join(settings.expert_names)}\n",
        f"A gate on the hidden state of `{base}` that decides, per token, whether it or one of its experts ({names}) "
        "writes. The method is Co-LLM's ([arXiv 2403.03870](https://arxiv.org/abs/2403.03870)).\n",
        *(["The base was trained along with the gate: it is needed too.\n"] if trained else []),
        f"## Serve\n\n```toml\n{tomli_w.dumps(config)}```\n\n    collm serve --config FILE\n",
        "## What it is\n",
        f"- kind: {kind}; hidden size {gate.hidden_size}; experts, in order: {names}",
        f"- default threshold {gate.default_threshold:.6g}: on validation questions a score of {found['score']:.3f} at "
        f"a deferral rate of {found['deferral_rate']:.3f}",
        f"- trained on {gate.data}, {gate.date}",
        *_regret(project, seed),
        "",
        *_evaluated(project),
        f"## Settings\n\n```json\n{json.dumps(gate.training, indent=1, ensure_ascii=False)}\n```",
    ]
    return "\n".join(parts) + "\n"


def _front_matter(base: str, mode: str) -> str:
    fields: dict[str, Any] = {"library_name": "collm", "tags": ["co-llm", "deferral-gate", f"mode-{mode}"]}
    # Hubs link a base by its name there; a folder means nothing to anybody else.
    if _NAME.fullmatch(base) and not Path(base).exists():
        fields["base_model"] = base
    # JSON is YAML.
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _regret(project: Project, seed: int) -> list[str]:
    """What the card says of the regret that goes with the gate, if one does."""
    stage = graph.regret(project, seed) if project.settings.regret.ahead else None
    if stage is None or not stage.done or not stage.results["made"]:
        return []
    never, chosen = stage.results["points"][0], stage.results["chosen"]
    ahead = project.settings.regret.ahead
    how = f"- with a regret: an expert's token may be taken back once the base has read {ahead} tokens from it on"
    if chosen == never:
        return [f"{how}; on validation questions this bettered nothing"]
    return [
        f"{how}: with `gate.regret = {chosen['threshold']:g}`, on validation questions a score of "
        f"{chosen['score']:.3f} instead of {never['score']:.3f}"
    ]


def _evaluated(project: Project) -> list[str]:
    """The evaluation's table, if it is there and of these settings."""
    stage = graph.evaluation(project) if project.settings.data.test is not None else None
    if stage is None or not stage.done:
        return []
    return ["## Evaluation\n", (stage.path / "table.md").read_text(encoding="utf-8")]

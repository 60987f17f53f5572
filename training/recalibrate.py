"""``collm train recalibrate``: the curve of a gate that is there, measured anew where the pair is served.

What experts cost is of the machine that it was measured on, and gates that an earlier version calibrated have curves
that lack it. The gate itself stays: its tensors and its default threshold.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from engine.errors import GateError
from engine.gate import GateArtifact
from training.answers import AnswerCache
from training.checkpoints import expert_checkpoint
from training.files import StageFolder
from training.gate_only import Gate
from training.graph import STAGES
from training.project import Project
from training.reliability import reliability
from training.serving import questions_of
from training.stages.calibrate import Decoder, by_falling_threshold
from training.stages.score import score_split
from training.thresholds import LOG_ODDS, ends, log_odds


def recalibrate(project: Project, gate: Path, to: Path, times: int = 3) -> GateArtifact:
    """Decode the validation questions at ``calibrate.rates``, at the gate's ends and at its default threshold.

    Args:
        project: whose base and experts the gate is served with; trained stages are not looked at.
        gate: folder of the artifact.
        to: gets the artifact with the new curve; may be ``gate``.
        times: how often each threshold's answers are decoded, for costs that other work on the machine has no part in.

    Raises:
        GateError: the gate cannot be read, or is not of these models.
    """
    artifact = GateArtifact.load(gate)
    if artifact.experts != tuple(project.expert_paths):
        raise GateError(
            f"{gate}: the gate is for the experts {', '.join(artifact.experts)}, in this order, and the project has "
            f"{', '.join(project.expert_paths)}"
        )
    checkpoints = [expert_checkpoint(path, project.base) for path in project.expert_paths.values()]
    artifact.check_fits(project.base, checkpoints)
    settings, function = project.settings, Gate.of(artifact)
    inputs = {"validation data": project.data("validation").fingerprint}
    # Answers are kept by the models, and what they are asked with: a run that was cut off goes on.
    stage = StageFolder(project.folder("recalibrate"), STAGES["calibrate"].resolve(settings), inputs).claim()
    scores = score_split(project, "validation")
    observed_N = function.log_odds_of(scores.base)
    with AnswerCache(project, stage.path / "answers", "recalibrate", project.base, gate) as cache:
        questions = questions_of(project, "validation", settings.calibrate.limit)
        decoder = Decoder(cache, questions, observed_N, times)
        points = [
            *map(decoder.at_rate, settings.calibrate.rates),
            *map(decoder.at_threshold, (*ends(observed_N, LOG_ODDS), log_odds(artifact.default_threshold))),
        ]
    curve = [point.to_json() for point in by_falling_threshold(points)]
    believed = reliability(torch.sigmoid(observed_N), scores.weak_labels() > 0)
    measured = replace(artifact, calibration=curve, reliability=believed)
    measured.save(to)
    stage.finish()
    chosen = points[-1]
    print(
        f"{to}: {len(curve)} points; the default threshold, {artifact.default_threshold:.6g}, stays: "
        f"score {chosen.score:.3f} at a rate of {chosen.deferral_rate:.3f}"
    )
    return measured

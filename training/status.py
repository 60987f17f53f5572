"""``collm train status``: what is done, what is stale and why, what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from training import graph
from training.files import StageFolder
from training.graph import BASE, GATED
from training.project import Project

State = Literal["done", "stale", "started", "missing", "waits"]


@dataclass(frozen=True)
class Output:
    """One output of a stage.

    Attributes:
        what: of which split and model, seed, or method and seed.
        why: what makes it stale, or what it waits for.
    """

    stage: str
    what: str
    state: State
    why: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """For people."""
        state = {"waits": "waits for", "missing": "not begun", "started": "not finished"}.get(self.state, self.state)
        why = ", ".join(self.why)
        said = state if not why else f"{state} {why}" if self.state == "waits" else f"{state}: {why}"
        return f"{self.stage:<10} {self.what:<28} {said}"


def print_status(project: Project) -> None:
    """One line for each output of the project."""
    for output in outputs(project):
        print(output.line)


def outputs(project: Project) -> Iterator[Output]:
    """All outputs of a project, in the order in which they are made. Nothing is made or moved."""
    for split in project.splits[:2]:
        for name in (*project.expert_paths, BASE):
            yield _of("score", f"{split}, {name}", graph.scores(project, split, name))
    gates: dict[int, Output] = {}
    for seed in project.settings.seeds:
        gates[seed] = _of("init", f"seed {seed}", graph.initial_gate(project, seed))
        yield gates[seed]
    last: dict[str, None] = {}
    for method, seed in graph.runs(project.settings):
        name = f"{method}, seed {seed}"
        trained = _of("train", name, graph.training_run(project, method, seed), waits_for=gates[seed])
        yield trained
        if method in GATED:
            if method == "collm" and project.settings.rollouts.rounds:
                if trained.state == "done":
                    trained = _of("rollouts", name, graph.rollouts(project, seed))
                else:
                    trained = Output("rollouts", name, "waits", (f"train ({name})",))
                yield trained
            if trained.state == "done":
                found = _of("calibrate", name, graph.calibration(project, method, seed))
            else:
                found = Output("calibrate", name, "waits", (f"{trained.stage} ({name})",))
            yield found
            if method == "collm" and project.settings.regret.ahead:
                if found.state == "done":
                    found = _of("regret", name, graph.regret(project, seed))
                else:
                    found = Output("regret", name, "waits", (f"calibrate ({name})",))
                yield found
            last |= {} if found.state == "done" else {found.stage: None}
            if method == "collm" and seed == project.settings.seeds[0]:
                yield _export(project, found)
    if project.settings.data.test is not None:
        if last:
            yield Output("evaluate", "test", "waits", tuple(last))
        else:
            yield _of("evaluate", "test", graph.evaluation(project))


def _of(stage: str, what: str, folder: StageFolder, *, waits_for: Output | None = None) -> Output:
    if folder.done:
        return Output(stage, what, "done")
    if differences := folder.differences:
        return Output(stage, what, "stale", differences)
    if waits_for is not None and waits_for.state != "done":
        return Output(stage, what, "waits", (f"{waits_for.stage} ({waits_for.what})",))
    return Output(stage, what, "started" if folder.begun else "missing")


def _export(project: Project, found: Output) -> Output:
    """The pair has no settings of its own: it is a copy. ``found``: of the stage whose gate it has."""
    what = "pair"
    if found.state != "done":
        return Output("export", what, "waits", (f"{found.stage} ({found.what})",))
    seed, gate = project.settings.seeds[0], project.folder("pair", "gate")
    if not gate.is_dir():
        return Output("export", what, "missing")
    same = project.hash_of(gate) == project.hash_of(graph.exported_gate(project, seed))
    return Output("export", what, "done") if same else Output("export", what, "stale", ("the gate is another one",))

"""``collm train status``: what is done, what is stale and why, what waits for what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
                trained = _behind(trained, "rollouts", partial(graph.rollouts, project, seed))
                yield trained
            found = _behind(trained, "calibrate", partial(graph.calibration, project, method, seed))
            yield found
            if method == "collm" and project.settings.regret.ahead:
                found = _behind(found, "regret", partial(graph.regret, project, seed))
                yield found
            if found.state != "done":
                last[found.stage] = None
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


def _behind(before: Output, stage: str, folder: Callable[[], StageFolder]) -> Output:
    """Of the same run as ``before``, whose output it reads: without that there is no telling what it would be of."""
    if before.state != "done":
        return Output(stage, before.what, "waits", (f"{before.stage} ({before.what})",))
    return _of(stage, before.what, folder())


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

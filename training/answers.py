"""Answers that are kept on disk, so that calibration and evaluation ask the serving engine for each set once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from training import serving
from training.files import hash_of, read_json, write_json
from training.project import Project
from training.serving import Questions, Result


class AnswerCache:
    """Answers of one base, its gate and the experts: read from a folder, or asked of the engine.

    The engine starts for the first set of answers that the folder lacks. Use it in a ``with`` statement.

    Args:
        folder: one file per set, named by what decides it: the models, the gate and how they are asked. The questions
            are no part of the name: they are an input of the stage that the folder belongs to.
        label: names the models in progress bars.
        gate: None serves only what needs none.
        experts: whether there are any beside the base.

    Attributes:
        members: how many models there are.
        has_gate: whether a gate says which of them writes.
    """

    def __init__(
        self, project: Project, folder: Path, label: str, base: Path, gate: Path | None, *, experts: bool = True
    ) -> None:
        paths = project.expert_paths if experts else {}
        self.members = 1 + len(paths)
        self.has_gate = gate is not None
        self._folder = folder
        self._label = label
        self._start = partial(serving.pair_of, project, base, gate, experts=experts)
        self._models = [
            project.hash_of(base),
            *map(project.hash_of_expert, paths),
            *([project.hash_of(gate)] if gate else []),
        ]
        self._pair: serving.Pair | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pair is not None:
            self._pair.__exit__(kind, error, trace)

    def answers(self, what: str, questions: Questions, **how: Any) -> Result:
        """Answers to the questions.

        Args:
            what: in words; with ``how``, it names the set.
            how: as in ``Pair.answer``.
        """
        file = self._folder / f"{hash_of([what, how, self._models])}.json"
        if file.exists():
            return Result.from_json(read_json(file))
        if self._pair is None:
            self._pair = self._start()
        result = self._pair.answer(questions, f"{self._label}: {what}", **how)
        write_json(file, {"what": what, "how": how} | result.to_json())
        return result

    def at_threshold(self, what: str, questions: Questions, threshold: float) -> Result:
        """The gate's answers at a threshold; those that no probability reaches are policies of their own."""
        if threshold < 0:
            return self.answers(what, questions, policy="always")
        if threshold >= 1:
            return self.answers(what, questions, policy="never")
        return self.answers(what, questions, policy="threshold", threshold=threshold)

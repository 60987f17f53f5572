"""Regret: learn when an expert's token is to be taken back, and choose from when on. Off by default.

Each gold token that would be disputed, the text before it being gold, is written anew by the pair that serves, with as
many tokens behind it as are read before looking back. The base's step there is what is learned from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.gate import GateArtifact
from engine.gates import FEATURES
from engine.hindsight import NEVER, NUMBERS, numbers_of
from engine.regret import RegretArtifact
from engine.types import Collaboration, Completion
from training import graph
from training.answers import AnswerCache
from training.data import TokenExample
from training.files import read_json, write_json
from training.gate_only import Gate
from training.project import Project
from training.regret import Disputes, Positions, Regret, chance, fit_regret
from training.scoring import ModelScores, gold_tokens
from training.serving import Pair, Questions, asked_numbers, pair_of, questions_of
from training.settings import Split
from training.stages.score import score_split, score_texts
from training.tracking import tracked

SPLITS: tuple[Split, Split] = ("train", "validation")


def run(project: Project) -> None:
    """Learn what is not there yet: the regret of each gate of Co-LLM."""
    if not project.settings.regret.ahead:
        return
    for method, seed in graph.runs(project.settings):
        if method == "collm":
            graph.need_run(project, method, seed)
            graph.calibration(project, method, seed).need("calibrate")
            if not graph.regret(project, seed).done:
                _Learner(project, seed).learn()


@dataclass(frozen=True)
class Read:
    """A disputed token of a gold completion, and what the pair wrote from there on.

    Attributes:
        example: its number in the split; ``index`` the token's in the completion.
        read: the tokens from there on that the base has read when it looks back; none where the text ends with the
            disputed one.
        sure: top probabilities: the base's and the expert's at the token, and the least of experts' behind it.
        regretted: as in :class:`~training.regret.Disputes`, as is ``weight``.
    """

    example: int
    index: int
    read: list[int]
    sure: list[float]
    regretted: bool
    weight: float


def read_of(completion: Completion, ahead: int, left: int) -> tuple[list[int], list[float]] | None:
    """``read`` and ``sure`` of a :class:`Read`; None where the pair that serves does not dispute the first token, as it
    may round otherwise than what scored.

    Args:
        completion: what the pair writes from the disputed token on, with its looks.
        left: most tokens that the answer may have from there on.
    """
    first, written = completion.looks[0], completion.tokens
    if completion.sources[0] == 0 or first.agreed is not False or first.base is None or first.expert is None:
        return None
    # Nobody reads the last token of a text: what the base says before it is the last that it says.
    over = completion.finish_reason == "stop" or len(written) == left
    last = len(written) - 1 if over else ahead
    behind = [
        look.expert
        for look, source in zip(completion.looks[1:last], completion.sources[1:last], strict=True)
        if source > 0 and look.expert is not None
    ]
    return written[:last], [first.base, first.expert, min(behind, default=1.0)]


class _Learner:
    """The regret beside one seed's gate."""

    def __init__(self, project: Project, seed: int) -> None:
        self._project, self._seed = project, seed
        self._settings = project.settings.regret
        self._base = project.base_of("collm", seed)
        self._calibrated = graph.calibration(project, "collm", seed).path / "gate"
        self._artifact = GateArtifact.load(self._calibrated)
        self._stage = graph.regret(project, seed).claim()
        self._folder = self._stage.path

    def learn(self) -> None:
        """Write ``gate/``: the calibrated gate and, where there is something to learn from, the regret beside it."""
        project, gate = self._project, self._folder / "gate"
        learned, held_out = self._positions()
        counts: dict[str, Any] = {
            split: {"disputed": len(found), "regretted": int(found.regretted_P.sum())}
            for split, found in zip(SPLITS, (learned, held_out), strict=True)
        }
        self._artifact.save(gate)
        if not (learned.both and held_out.both):
            self._stage.finish(made=False, **counts)
            print(
                f"warning: {self._folder}: there is nothing to learn a regret from: of the tokens at which an expert "
                f"wrote something else than the base, some must be the base's to decide and some not: {counts}"
            )
            return
        with tracked(project.settings, f"regret/collm-{self._seed}") as log:
            regret = fit_regret(learned, held_out, self._settings, self._seed, self._folder, project.device, log)
        measured = counts | {
            "held_out_loss": regret.loss, "loss_of_chance": chance(held_out), "auroc": regret.auroc(held_out)
        }  # fmt: skip
        self._made(regret, NEVER, measured).save(gate)
        points = self._answered(gate)
        # The first of equals: the one that takes back least.
        best = max(points, key=lambda point: point["score"])
        measured |= {"points": points, "chosen": best}
        self._made(regret, best["threshold"], measured).save(gate)
        self._stage.finish(made=True, **measured)
        self._say(points[0], best)

    def _say(self, never: dict[str, float], best: dict[str, float]) -> None:
        if best["threshold"] == NEVER:
            print(
                f"warning: {self._folder}: no answer is better for tokens taken back: of the thresholds that were "
                f"tried on validation questions none beats {never['score']:.3f}, so that it is 1, which is never"
            )
        else:
            print(
                f"{self._folder}: threshold {best['threshold']:g}: score {best['score']:.3f} on validation questions, "
                f"{never['score']:.3f} without; {best['taken_back']:.2f} tokens taken back per answer; "
                f"a server does so with gate.regret = {best['threshold']:g}, or where a request asks for it"
            )

    def _made(self, regret: Regret, threshold: float, measured: dict[str, Any]) -> RegretArtifact:
        artifact, settings = self._artifact, self._settings
        return RegretArtifact(
            theta=regret.gate.theta_KD,
            bias=regret.gate.bias_K,
            numbers=regret.numbers_N,
            ahead=settings.ahead,
            base=artifact.base,
            default_threshold=threshold,
            training={**self._stage.settings, "measured": measured},
            data=artifact.data,
            date=artifact.date,
            kind=settings.kind,
            features=settings.features,
            layers=regret.gate.layers,
        )

    # -- what is learned from ---------------------------------------------------------------------------------

    def _positions(self) -> tuple[Positions, Positions]:
        """Of the training and of the validation questions."""
        file = self._folder / "read.json"
        if not file.exists():
            write_json(file, {split: list(map(asdict, found)) for split, found in self._written().items()})
        learned, held_out = ([Read(**each) for each in read_json(file)[split]] for split in SPLITS)
        texts = [*self._texts("train", learned), *self._texts("validation", held_out)]
        if not texts:
            return _known(_NOTHING, learned), _known(_NOTHING, held_out)
        label = f"regret, seed {self._seed}: look back"
        scores = score_texts(self._project, self._base, texts, self._folder / "looked-back", label)
        count = len(learned)
        return _known(scores.rows(slice(count)), learned), _known(scores.rows(slice(count, None)), held_out)

    def _texts(self, split: Split, found: Sequence[Read]) -> Iterator[TokenExample]:
        """What the base has read. Which token would come then is not looked at: any stands for it."""
        tokens = self._project.data(split).tokens
        for each in found:
            asked = tokens[each.example]
            yield TokenExample([*asked.prompt, *asked.completion[: each.index], *each.read], [0])

    def _written(self) -> dict[Split, list[Read]]:
        """What the pair writes at tokens that are disputed by the scores."""
        project, settings = self._project, self._settings
        limits: dict[Split, int | None] = {"train": settings.questions, "validation": project.settings.calibrate.limit}
        disputes = {split: self._disputes(split, limits[split]).some(settings.positions) for split in SPLITS}
        if not any(len(found.row_P) for found in disputes.values()):
            return {split: [] for split in SPLITS}
        with pair_of(project, self._base.path, self._calibrated) as pair:
            return {split: self._read(pair, split, found) for split, found in disputes.items()}

    def _disputes(self, split: Split, limit: int | None) -> Disputes:
        scores = score_split(self._project, split, self._base)
        asked = torch.zeros(len(scores.starts) - 1, dtype=torch.bool)
        asked[asked_numbers(self._project, split, limit)] = True
        rows_N = asked.repeat_interleave(torch.tensor(scores.starts).diff())
        return Disputes.of(scores, Gate.of(self._artifact), self._artifact.default_threshold, rows_N)

    def _read(self, pair: Pair, split: Split, disputes: Disputes) -> list[Read]:
        project, data, ahead = self._project, self._project.data(split), self._settings.ahead
        starts = torch.tensor(gold_tokens(data.tokens)[1])
        number_P = torch.searchsorted(starts, disputes.row_P, right=True) - 1
        index_P = disputes.row_P - starts[number_P]
        places = list(zip(number_P.tolist(), index_P.tolist(), strict=True))
        if not places:
            return []
        questions = Questions(
            [data.examples[number] for number, _ in places],
            [data.tokens[number] for number, _ in places],
            project.settings.evaluate.room,
            [data.tokens[number].completion[:index] for number, index in places],
            ahead,
        )
        asked = Collaboration(policy="threshold", threshold=self._artifact.default_threshold, looks=True)
        completions = pair.complete(questions, asked, f"regret, seed {self._seed}: {split}")
        found = []
        outcomes = zip(disputes.regretted_P.tolist(), disputes.weight_P.tolist(), strict=True)
        for (number, index), outcome, completion in zip(places, outcomes, completions, strict=True):
            left = len(data.tokens[number].completion) - index + questions.room
            read = read_of(completion, ahead, left)
            if read is not None:
                found.append(Read(number, index, *read, *outcome))
        return found

    # -- from when on a token is taken back -------------------------------------------------------------------

    def _answered(self, gate: Path) -> list[dict[str, float]]:
        """The answers to the validation questions without taking back, and at each threshold, the greatest first."""
        project, settings, threshold = self._project, self._settings, self._artifact.default_threshold
        questions = questions_of(project, "validation", project.settings.calibrate.limit)
        points = []
        label = f"regret collm-{self._seed}"
        with AnswerCache(project, self._folder / "answers", label, self._base.path, gate) as cache:
            for regret in (NEVER, *sorted(set(settings.thresholds), reverse=True)):
                found = cache.answers("regret", questions, policy="threshold", threshold=threshold, regret=regret)
                measured = {"score": found.score, "deferral_rate": found.deferral_rate, "taken_back": found.taken_back}
                points.append({"threshold": regret} | measured)
        return points


_NOTHING = ModelScores(torch.empty(0), torch.empty(0), torch.empty(0, 1), torch.empty(0, len(FEATURES)))


def _known(scores: ModelScores, found: Sequence[Read]) -> Positions:
    """The positions, in the order of the scores."""
    assert scores.features_NF is not None
    after_P = scores.features_NF[:, FEATURES.index("logprob_1")].exp().tolist()
    numbers = [
        numbers_of(each.sure[0], each.sure[1], after, [each.sure[2]])
        for each, after in zip(found, after_P, strict=True)
    ]
    return Positions(
        scores,
        torch.tensor(numbers).view(len(found), len(NUMBERS)),
        torch.tensor([each.regretted for each in found], dtype=torch.bool),
        torch.tensor([each.weight for each in found]),
    )

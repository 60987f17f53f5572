"""Rollouts: trained gates learn from answers that they draw on the serving engine. Off by default."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.gate import GateArtifact
from engine.types import Collaboration
from training import graph
from training.answers import AnswerCache
from training.checkpoints import load_causal
from training.data import TokenExample
from training.errors import SettingsError
from training.files import read_json, write_json, write_tensors
from training.fit import Plan, remove_checkpoint
from training.gate_only import Gate, scaling_of
from training.project import Project
from training.rollouts import Rollouts, RoundFit, advantages, drawing, fit_round
from training.scoring import ModelScores, score_shard
from training.serving import Questions, Result, pair_of, questions_of
from training.stages.init import FILE
from training.stages.score import TrainingScores, score_base
from training.thresholds import LOG_ODDS, probability, quantile
from training.tracking import tracked


def run(project: Project) -> None:
    """Let the gates of Co-LLM learn that have not yet."""
    if not project.settings.rollouts.rounds:
        return
    for name in project.expert_paths:
        if project.own_speller(name) is not None:
            raise SettingsError(f"rollouts.rounds: {name} has a vocabulary of its own, and is not asked everywhere")
    scores = TrainingScores(project)
    for method, seed in graph.runs(project.settings):
        if method == "collm":
            graph.need_training(project, method, seed)
            if not graph.rollouts(project, seed).done:
                _Learner(project, seed).learn(scores)


class _Learner:
    """The gate of one seed."""

    def __init__(self, project: Project, seed: int) -> None:
        self._project, self._seed = project, seed
        self._settings = project.settings.rollouts
        self._base = project.base_of("collm", seed)
        self._folder = project.folder("rollouts", f"collm-{seed}")
        self._trained = GateArtifact.load(project.run("collm", seed) / "gate")

    def learn(self, scores: TrainingScores) -> None:
        """Write ``gate/``: the better one on validation questions of what was learned and what was trained."""
        project, settings, folder = self._project, self._settings, self._folder
        stage = graph.rollouts(project, self._seed).claim()
        start = Gate.of(self._trained)
        before, threshold = self._best("start", start)
        gate = drawing(start, threshold)
        rewards = []
        with tracked(project.settings, f"rollouts/collm-{self._seed}") as log:
            for number in range(settings.rounds):
                label, done = f"rollouts, seed {self._seed}, round {number + 1}", folder / f"round-{number}"
                if not (done / FILE).exists():
                    found, reward = self._drawn(gate, number, label, done)
                    plan = Plan(settings.steps, 0.0, settings.steps, log)
                    rate, seed = settings.learning_rate, self._seed * 1000 + number
                    fitting = RoundFit(rate, settings.clip, settings.answers, plan, seed)
                    scaling = scaling_of(gate, scores.loaded.base, bias=True)
                    write_json(done / "reward.json", reward)
                    gate = fit_round(gate, found, scaling, fitting, done, label)
                    write_tensors(done / FILE, gate.tensors)
                    remove_checkpoint(done)
                gate = Gate.from_tensors(load_file(str(done / FILE)), start)
                rewards.append(read_json(done / "reward.json"))
        after, _ = self._best("learned", gate)
        kept = "learned" if after > before else "start"
        self._artifact(gate if kept == "learned" else start).save(folder / "gate")
        stage.finish(kept=kept, held_out={"start": before, "learned": after}, rewards=rewards)
        print(f"{folder}: the {kept} gate is kept: on validation questions, {before:.4f} before and {after:.4f} after")

    def _artifact(self, gate: Gate) -> GateArtifact:
        return replace(self._trained, theta=gate.theta_KD, bias=gate.bias_K, layers=gate.layers)

    def _reward(self, result: Result) -> torch.Tensor:
        """Of each answer: whether it is right, less what its expert tokens cost."""
        return torch.tensor(
            [
                float(answer.exact) - self._settings.cost * sum(source > 0 for source in answer.sources)
                for answer in result.answers
            ]
        )

    def _best(self, name: str, gate: Gate) -> tuple[float, float]:
        """The greatest mean reward of a gate on the validation questions, over a sweep of thresholds, and its
        threshold, in log-odds.
        """
        project, path = self._project, self._folder / name
        self._artifact(gate).save(path)
        observed_N = gate.log_odds_of(score_base(project, "validation", self._base))
        questions = questions_of(project, "validation", project.settings.calibrate.limit)
        points = []
        with AnswerCache(project, self._folder / "answers", f"{name} gate", self._base.path, path) as cache:
            for rate in project.settings.calibrate.rates:
                threshold = quantile(observed_N, rate, LOG_ODDS)
                asked = probability(threshold)
                found = cache.at_threshold(f"threshold {asked:.6g}", questions, asked)
                finite = min(max(threshold, LOG_ODDS.least), LOG_ODDS.greatest)
                points.append((float(self._reward(found).mean()), finite))
        return max(points)

    def _drawn(self, gate: Gate, number: int, label: str, folder: Path) -> tuple[Rollouts, float]:
        """Answers to a round's questions, and their mean reward."""
        project, settings, data = self._project, self._settings, self._project.data("train")
        order = list(range(len(data.examples)))
        random.Random(self._seed).shuffle(order)
        count = min(settings.questions, len(order))
        numbers = [order[(number * count + place) % len(order)] for place in range(count)]
        tokens = [data.tokens[n] for n in numbers]
        questions = Questions([data.examples[n] for n in numbers], tokens, project.settings.evaluate.room)
        self._artifact(gate).save(folder / "gate")
        base = self._base.path
        written: list[TokenExample] = []
        lanes: list[int] = []
        rewards = []
        with pair_of(project, base, folder / "gate") as pair:
            for sample in range(settings.samples):
                seed = random.Random(f"{self._seed}, {number}, {sample}").getrandbits(32)
                drawn = Collaboration(policy="sample")
                completions = pair.complete(questions, drawn, f"{label}, answer {sample + 1}", seed=seed)
                rewards.append(self._reward(pair.result(questions, completions, 1.0)))
                for asked, completion in zip(tokens, completions, strict=True):
                    written.append(TokenExample(asked.prompt, completion.tokens))
                    lanes += completion.sources
        reward_GQ = torch.stack(rewards)
        model = load_causal(base, project.settings.compute.dtype, project.device)
        found = score_shard(model, written, project.settings.score.batch_size, project.vocabulary, hidden=True)
        scores = ModelScores(found["logp"], found["top"], found["hidden"], found["features"])
        starts = torch.tensor([0, *(len(text.completion) for text in written)]).cumsum(0).tolist()
        advantage_A = advantages(reward_GQ.T).T.flatten()
        return Rollouts(scores.inputs(gate.features), torch.tensor(lanes), starts, advantage_A), float(reward_GQ.mean())

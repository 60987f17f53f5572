"""What taking tokens back could gain over a veto: ``python -m training.demo.regret``.

A pair whose expert lacks a third of the facts: the demo's base, which knows two fifths of the entities once it has read
of them again, and ``codes`` trained anew without a third of all, whichever they are. Three ways to defer: by a gate
that was trained with this expert, by confidence, and by a gate that knows what codes look like, not what the base
knows. For each, the questions are answered greedily in float32 without second looks, with a veto by the expert's
confidence, with one that is learned, with regrets after reading on, and with an oracle that looks up which of both
tokens is right.

A seed draws the third and starts the expert; each head starts three times. Whatever has a threshold gets it on
validation questions.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from engine.checkpoints import WEIGHTS, model_identity
from engine.hindsight import NEVER
from training.auroc import auroc
from training.bootstrap import interval
from training.checkpoints import forward, load_causal, quiet
from training.command import run_command
from training.demo.corpus import Corpus, tokenized
from training.demo.facts import Entity, source
from training.demo.lookback import Head, Outcome, Policy, Reading, Rule, Trace, Writer, labelled, settle
from training.demo.models import BASE_RECIPE, CODES_RECIPE
from training.demo.pretrain import SEED, one_thread
from training.demo.text import GREETING, Example, questions
from training.demo.tokenizer import EOS_ID, save_tokenizer
from training.demo.train import Document, base_documents, codes_documents, save_model, train_model, train_pass
from training.files import read_json, write_json

LACKING = 1 / 3
REFRESHING, REFRESHING_RATE = 400, 2e-3
"""Steps, and their learning rate, in which the shipped base learns its own facts again."""
STARTS = 3
"""Of each head, from other weights."""
MAX_TOKENS = 96
WIDTH = 32
POLICIES = ("gate", "confidence", "kind")
CONFIDENCES = (0.1, 0.3, 0.5, 0.7)
"""Thresholds of confidence deferral: defer where the base's top probability is below 1 minus this."""
VETOES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
REGRETS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
SERVED = "regret after 4, as served"
READINGS: dict[str, tuple[Reading, int]] = {
    "learned veto, nothing read": (Reading(0, numbers=True), WIDTH),
    "regret after 1, hidden state, linear": (Reading(1, numbers=False), 0),
    "regret after 4, hidden state, linear": (Reading(4, numbers=False), 0),
    "regret after 1": (Reading(1, numbers=True), WIDTH),
    "regret after 2": (Reading(2, numbers=True), WIDTH),
    "regret after 4": (Reading(4, numbers=True), WIDTH),
    "regret after 1, as served": (Reading(1, numbers=True, served=True), WIDTH),
    SERVED: (Reading(4, numbers=True, served=True), WIDTH),
}
"""What each head looks at, and the width of its hidden layer."""
PLAIN, VETO, ORACLE = "deferral", "veto", "oracle"
SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}
"""Of the entities that the base knows."""


@dataclass(frozen=True)
class Asked:
    """A split's questions, as token ids.

    Attributes:
        codes: of each question's completion, which tokens belong to a code.
    """

    prompts: list[list[int]]
    gold: list[list[int]]
    codes: list[list[bool]]

    @classmethod
    def of(cls, examples: Sequence[Example], tokenizer: Tokenizer) -> Asked:
        """The questions with their answers."""
        found = tokenized(examples, tokenizer)
        return cls(
            [each.prompt for each in found],
            [each.completion for each in found],
            [_in_codes(example, tokenizer) for example in examples],
        )


def _in_codes(example: Example, tokenizer: Tokenizer) -> list[bool]:
    """Of each token, the EOS included, whether it is part of a code."""
    spans, start = [], 0
    for code in example.codes:
        # Not the first " is": that is the language code of Icelandic, too.
        start = example.completion.index(f" is {code}", start) + len(" is ")
        spans.append((start, start + len(code)))
        start += len(code)
    offsets = tokenizer.encode(example.completion).offsets
    return [any(begin < last and first < end for first, last in spans) for begin, end in offsets] + [False]


def splits(corpus: Corpus) -> dict[str, list[Example]]:
    """One wording of every question about codes, of entities that the base knows and of those that it does not."""
    rng = random.Random(SEED)
    known = sorted(corpus.splits["base"], key=lambda entity: entity.name)
    rng.shuffle(known)
    dealt, first = {}, 0
    for name, share in SHARES.items():
        last = first + round(share * len(known))
        dealt[name] = known[first:last]
        first = last
    entities = {name: dealt[name] + corpus.splits["gate" if name == "train" else name] for name in SHARES}
    return {name: _wordings(found, rng) for name, found in entities.items()}


def _wordings(entities: Sequence[Entity], rng: random.Random) -> list[Example]:
    chosen = []
    for entity in entities:
        by_task: dict[str, list[Example]] = {}
        for question in questions(entity):
            if question.task != GREETING:
                by_task.setdefault(question.task, []).append(question)
        chosen += [rng.choice(found) for found in by_task.values()]
    return chosen


def lacking(corpus: Corpus, seed: int) -> list[Entity]:
    """The third of all entities that the expert never reads of."""
    return random.Random(seed).sample(corpus.entities, round(LACKING * len(corpus.entities)))


def make_base(corpus: Corpus, tokenizer: Tokenizer, shipped: Path, folder: Path) -> dict[str, Any]:
    """Train the shipped base on, on its own facts and its other texts by halves: deferral has had it forget codes.

    Returns:
        What it was made by.
    """
    recipe = replace(BASE_RECIPE, passes=(REFRESHING,), learning_rate=REFRESHING_RATE)
    settings = {
        "recipe": asdict(recipe) | {"passes": [REFRESHING]},
        "facts": source(),
        "shipped": hashlib.sha256((shipped / WEIGHTS).read_bytes()).hexdigest(),
    }
    done = folder.with_name(f"{folder.name}.json")
    if done.exists() and read_json(done) == settings:
        print(f"{folder}: already made")
        return settings
    others = base_documents(corpus, tokenizer)
    known = tokenized([asked for entity in corpus.splits["base"] for asked in questions(entity)], tokenizer)

    def draw(rng: random.Random) -> Document:
        if rng.random() < 0.5:
            return others(rng)
        ids = rng.choice(known)
        return Document([*ids.prompt, *ids.completion], [True] * (len(ids.prompt) + len(ids.completion)))

    model = load_causal(shipped)
    train_pass(model, recipe, 0, draw, "base", 0)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    write_json(done, settings)
    return settings


def make_expert(corpus: Corpus, tokenizer: Tokenizer, seed: int, folder: Path) -> dict[str, Any]:
    """Train ``codes`` without the entities that it is to lack; as many readings of each fact as the demo's has.

    Returns:
        What it was made by.
    """
    without = lacking(corpus, seed)
    kept = [entity for entity in corpus.entities if entity not in without]
    steps = round(CODES_RECIPE.passes[0] * len(kept) / len(corpus.entities))
    recipe = replace(CODES_RECIPE, passes=(steps,), seed=CODES_RECIPE.seed + 100 * seed)
    settings = {"recipe": asdict(recipe) | {"passes": [steps]}, "seed": seed, "kept": len(kept), "facts": source()}
    done = folder.with_name(f"{folder.name}.json")
    if done.exists() and read_json(done) == settings:
        print(f"{folder}: already made")
        return settings
    save_model(train_model(recipe, [codes_documents(kept, tokenizer)], f"codes, seed {seed}"), folder)
    save_tokenizer(tokenizer, folder)
    write_json(done, settings)
    return settings


class _Forced:
    """What both models say of gold text: the base's states [N, d], and whether each is right [N]."""

    def __init__(self, base: PreTrainedModel, expert: PreTrainedModel, asked: Asked) -> None:
        states, base_right, expert_right = [], [], []
        for prompt, gold in zip(asked.prompts, asked.gold, strict=True):
            ids_BT, want_N = torch.tensor([prompt + gold]), torch.tensor(gold)
            with torch.inference_mode():
                places = slice(len(prompt) - 1, -1)
                hidden_BTD, logits_BTV = forward(base, ids_BT)
                states.append(hidden_BTD[0, places])
                base_right.append(logits_BTV[0, places].argmax(-1) == want_N)
                expert_right.append(forward(expert, ids_BT)[1][0, places].argmax(-1) == want_N)
        self.states_ND = torch.cat(states)
        self.base_right_N, self.expert_right_N = torch.cat(base_right), torch.cat(expert_right)


def _by_head(head: Head) -> Policy:
    return lambda hidden_BD, _: head(hidden_BD) > 0.5


def _by_confidence(threshold: float) -> Policy:
    return lambda _, logprobs_BV: 1 - logprobs_BV.amax(-1).exp() > threshold


class Measured:
    """One seed's models and questions."""

    def __init__(self, base: PreTrainedModel, expert: PreTrainedModel, asked: dict[str, Asked], seed: int) -> None:
        self._models = base, expert
        self._asked = asked
        self._seed = seed
        self._forced = {name: _Forced(base, expert, asked[name]) for name in ("train", "validation")}

    def policy(self, name: str) -> tuple[Policy, str]:
        """A way to defer, and what was chosen for it."""
        if name == "confidence":
            scored = {}
            for threshold in CONFIDENCES:
                written = self._plain(_by_confidence(threshold), "validation")
                scored[threshold] = sum(self._right("validation", written))
            best = max(CONFIDENCES, key=lambda threshold: (scored[threshold], threshold))
            return _by_confidence(best), f"{name}, threshold {best:g}"
        return _by_head(self.gate(name)), name

    def gate(self, name: str) -> Head:
        """A gate, of its name in :data:`POLICIES`."""
        labels = {}
        for split, forced in self._forced.items():
            needed_N = ~forced.base_right_N & forced.expert_right_N
            in_code_N = torch.tensor([each for codes in self._asked[split].codes for each in codes])
            labels[split] = forced.states_ND, needed_N if name == "gate" else in_code_N
        return Head.fit(labels["train"], labels["validation"], width=WIDTH, seed=self._seed)

    def served(self, name: str) -> tuple[Head, Head, Reading, dict[float, dict[int, Outcome]]]:
        """A gate, a regret as it is served, what that reads, and the test questions' answers by threshold."""
        gate = self.gate(name)
        writers = {split: self._writer(_by_head(gate), split) for split in self._asked}
        traces = {split: writer.traces(dict.fromkeys(self._numbers(split), ())) for split, writer in writers.items()}
        reading, width = READINGS[SERVED]
        learned, held_out = (
            labelled(traces[split], self._asked[split].gold, reading) for split in ("train", "validation")
        )
        head = Head.fit(learned, held_out, width=width, seed=STARTS * self._seed, added=reading.added)
        rule = partial(_learned, head, reading)
        answers = {threshold: settle(writers["test"], self._numbers("test"), rule, threshold) for threshold in REGRETS}
        return gate, head, reading, answers

    def measure(self, name: str) -> list[dict[str, Any]]:
        """All rows of a way to defer, for each start of the heads."""
        policy, label = self.policy(name)
        writers = {split: self._writer(policy, split) for split in self._asked}
        traces = {split: writer.traces(dict.fromkeys(self._numbers(split), ())) for split, writer in writers.items()}

        def row(rule_of: Callable[[str], Rule], thresholds: Sequence[float]) -> dict[str, Any]:
            scored = {}
            for threshold in [NEVER, *sorted(thresholds, reverse=True)]:
                written = settle(writers["validation"], self._numbers("validation"), rule_of("validation"), threshold)
                scored[threshold] = sum(self._right("validation", written))
            # The first of equals: the one that takes back least.
            best = max(scored, key=lambda threshold: scored[threshold])
            found = settle(writers["test"], self._numbers("test"), rule_of("test"), best)
            return self._row("test", found) | {"threshold": best}

        rows = {
            PLAIN: row(_everywhere(_never), []),
            VETO: row(_everywhere(_veto), [1 - veto for veto in VETOES]),
            ORACLE: row(lambda split: partial(_oracle, self._asked[split].gold), [0.5]),
        }
        _, wrong_N = labelled(traces["test"], self._asked["test"].gold, Reading(0, numbers=False))
        counts: dict[str, Any] = {"label": label, "disputed": len(wrong_N), "wrong": int(wrong_N.sum())}
        by_start = [counts | {"rows": dict(rows)} for _ in range(STARTS)]
        for method, (reading, width) in READINGS.items():
            learned, held_out, (inputs_NI, wrong_N) = (
                labelled(traces[split], self._asked[split].gold, reading) for split in ("train", "validation", "test")
            )
            for start, found in enumerate(by_start):
                seed = STARTS * self._seed + start
                head = Head.fit(learned, held_out, width=width, seed=seed, added=reading.added)
                ours = row(_everywhere(partial(_learned, head, reading)), REGRETS)
                found["rows"][method] = ours | {"auroc": auroc(head(inputs_NI), wrong_N)}
        return by_start

    def alone(self) -> dict[str, float]:
        """Share of the test questions that the base answers without an expert."""
        written = self._plain(lambda hidden_BD, _: torch.zeros(len(hidden_BD), dtype=torch.bool), "test")
        right = self._right("test", written)
        return {"exact": sum(right) / len(right)}

    def _writer(self, policy: Policy, split: str) -> Writer:
        return Writer(*self._models, policy, self._asked[split].prompts, eos=EOS_ID, max_tokens=MAX_TOKENS)

    def _plain(self, policy: Policy, split: str) -> dict[int, Outcome]:
        return settle(self._writer(policy, split), self._numbers(split), _never, NEVER)

    def _numbers(self, split: str) -> range:
        return range(len(self._asked[split].prompts))

    def _right(self, split: str, found: dict[int, Outcome]) -> list[bool]:
        return [list(found[number].tokens) == gold for number, gold in enumerate(self._asked[split].gold)]

    def _row(self, split: str, found: dict[int, Outcome]) -> dict[str, Any]:
        tokens = sum(len(outcome.tokens) for outcome in found.values())
        return {
            "right": self._right(split, found),
            "deferral_rate": sum(outcome.deferred for outcome in found.values()) / tokens,
            "revoked": sum(outcome.revoked for outcome in found.values()),
        }


def _everywhere(rule: Rule) -> Callable[[str], Rule]:
    """A rule that is the same for all splits."""
    return lambda _: rule


def _never(_question: int, _trace: Trace, _index: int) -> float:
    return 0.0


def _veto(_question: int, trace: Trace, index: int) -> float:
    return 1 - trace.steps[index].expert_top


def _oracle(gold: Sequence[Sequence[int]], question: int, trace: Trace, index: int) -> float:
    """Where the text so far is right: whether the base's token is right, and the expert's therefore wrong."""
    with_draft = [*trace.prefix, *trace.tokens[:index], trace.steps[index].draft]
    return float(with_draft == list(gold[question][: len(with_draft)]))


def _learned(head: Head, reading: Reading, _question: int, trace: Trace, index: int) -> float:
    return float(head(reading(trace, index)[None]))


def run(pair: Path, out: Path, seeds: Sequence[int]) -> None:
    """Make what is not there yet, and print the tables of all seeds together.

    Raises:
        CollmError: the pair has no base.
    """
    quiet()
    one_thread()
    corpus = Corpus.make(SEED)
    model_identity(pair / "base")
    tokenizer = Tokenizer.from_file(str(pair / "base" / "tokenizer.json"))
    refreshed = make_base(corpus, tokenizer, pair / "base", out / "base")
    asked = {name: Asked.of(found, tokenizer) for name, found in splits(corpus).items()}
    for name, one in asked.items():
        print(f"{name}: {len(one.prompts)} questions")
    by_seed = []
    for seed in seeds:
        folder = out / f"seed-{seed}"
        settings = {
            "base": refreshed,
            "expert": make_expert(corpus, tokenizer, seed, folder / "codes"),
            "questions": {name: len(one.prompts) for name, one in asked.items()},
            "thresholds": [list(each) for each in (CONFIDENCES, VETOES, REGRETS)],
            "readings": list(READINGS),
            "starts": STARTS,
        }
        file = folder / "found.json"
        found = read_json(file) if file.exists() else {}
        if found.get("settings") != settings:
            found = {"settings": settings}
        missing = [name for name in POLICIES if name not in found]
        if missing:
            measured = Measured(load_causal(out / "base"), load_causal(folder / "codes"), asked, seed)
            found["base alone"] = measured.alone()
            for name in missing:
                found[name] = measured.measure(name)
                write_json(file, found)
        by_seed.append(found)
    print(f"\nbase alone: {by_seed[0]['base alone']['exact']:.3f}")
    for name in POLICIES:
        print("\n" + "\n".join(table([start for found in by_seed for start in found[name]])))


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of a way to defer over all seeds and starts."""
    labels = ", ".join(dict.fromkeys(one["label"] for one in found))
    disputed = ", ".join(dict.fromkeys(f"{one['wrong']} of {one['disputed']}" for one in found))
    lines = [
        f"**{labels}** (disputed tokens at which the expert is wrong: {disputed})",
        "",
        "| method | exact match | each | less the veto, 95 % | deferral rate | taken back per 100 answers | AUROC |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for method in found[0]["rows"]:
        rows = [one["rows"][method] for one in found]
        right = [row["right"] for row in rows]
        scores = [sum(each) / len(each) for each in right]
        against = [one["rows"][VETO]["right"] for one in found]
        differences = [
            [ours - theirs for ours, theirs in zip(*both, strict=True)] for both in zip(right, against, strict=True)
        ]
        low, high = interval(differences)
        aurocs = [row["auroc"] for row in rows if row.get("auroc") is not None]
        revoked = [100 * row["revoked"] / len(row["right"]) for row in rows]
        cells = [
            method,
            f"{fmean(scores):.3f}",
            ", ".join(f"{score:.3f}" for score in scores) if len(set(scores)) > 1 else "",
            "-" if method == VETO else f"{100 * low:+.1f} to {100 * high:+.1f} points",
            f"{fmean([row['deferral_rate'] for row in rows]):.3f}",
            f"{fmean(revoked):.0f}",
            f"{fmean(aurocs):.3f}" if aurocs else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.regret", description=__doc__.replace("``", ""))
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    parser.add_argument("--out", type=Path, default=Path("build/demo/regret"), help="output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the third that is lacking")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options.pair, options.out, options.seeds))


if __name__ == "__main__":
    sys.exit(main())

"""What second looks are worth on the demo pair: ``python -m training.demo.second_looks --pair models/demo``.

Two tables. The first: of the tokens that a report marks with ``check``, how many are wrong, and of the wrong ones, how
many are marked; likewise of whole answers. The second: the veto and the blends beside plain deferral, and beside what
as many steps of one member buy. Whatever has a threshold gets it on the validation questions. Greedy, on the serving
engine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from engine.blends import Blend
from engine.checkpoints import WEIGHTS, model_identity
from engine.second_look import deserves_check
from engine.types import BASE, Collaboration, Completion
from training.bootstrap import interval
from training.checkpoints import load_tokenizer
from training.command import run_command
from training.data import Example, TokenExample
from training.demo.corpus import Corpus, tokenized
from training.demo.pretrain import RECIPES, SEED
from training.serving import SAMPLE_TEMPERATURE, Pair, Questions, Result, engine_config, mean_logprob
from training.settings import EngineSettings

CONFIDENCES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
VETOES = (0.5, 0.7, 0.8, 0.9, 0.95)
EXPERTS = tuple(name for name in RECIPES if name != "base")
ROOM = 8
SAMPLES = 2


@dataclass(frozen=True)
class Marked:
    """How marks and faults meet: of tokens, or of answers.

    Attributes:
        hits: wrong and marked.
        false_alarms: marked, not wrong.
        misses: wrong, not marked.
    """

    hits: int = 0
    false_alarms: int = 0
    misses: int = 0

    @classmethod
    def count(cls, pairs: Iterable[tuple[bool, bool]]) -> Marked:
        """Of (marked, wrong)."""
        found = list(pairs)
        return cls(found.count((True, True)), found.count((True, False)), found.count((False, True)))

    @property
    def precision(self) -> float:
        """Of what is marked, the share that is wrong; 0 where nothing is marked."""
        return self.hits / max(1, self.hits + self.false_alarms)

    @property
    def recall(self) -> float:
        """Of what is wrong, the share that is marked; 0 where nothing is wrong."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        return 2 * self.hits / max(1, 2 * self.hits + self.false_alarms + self.misses)


def marks(completion: Completion, below: float) -> list[bool]:
    """Of each token, whether it is marked."""
    support = dict(completion.support)
    vetoed = set(completion.vetoed)
    return [
        deserves_check(source, look, support.get(number), doubted=number in vetoed, below=below)
        for number, (source, look) in enumerate(zip(completion.sources, completion.looks, strict=True))
    ]


def judged(completion: Completion, gold: Sequence[int]) -> list[bool]:
    """Of each token up to the first wrong one, whether it is that; what follows it continues another text."""
    wrong = []
    for token, want in zip(completion.tokens, gold, strict=False):
        wrong.append(token != want)
        if wrong[-1]:
            break
    return wrong


def of_tokens(completions: Sequence[Completion], questions: Questions, below: float) -> Marked:
    """Marks of single tokens."""
    pairs: list[tuple[bool, bool]] = []
    for completion, tokens in zip(completions, questions.tokens, strict=True):
        wrong = judged(completion, tokens.completion)
        pairs += zip(marks(completion, below)[: len(wrong)], wrong, strict=True)
    return Marked.count(pairs)


def of_answers(completions: Sequence[Completion], questions: Questions, below: float) -> Marked:
    """Marks of answers: marked where one of its tokens is."""
    return Marked.count(
        (any(marks(completion, below)), completion.tokens != list(tokens.completion))
        for completion, tokens in zip(completions, questions.tokens, strict=True)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.second_looks", description=__doc__.replace("``", ""))
    parser.add_argument("--pair", type=Path, default=Path("models/demo"), help="folder of the demo pair")
    options = parser.parse_args(arguments)
    return run_command(lambda: measure(options.pair), interrupted="nothing is kept")


def measure(folder: Path) -> None:
    """Print both tables.

    Raises:
        CollmError: the folder has no demo pair, or the engine fails.
    """
    model_identity(folder / "base")
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    corpus = Corpus.make(SEED)
    settings = EngineSettings(
        kv_cache_memory_bytes=1 << 26,
        max_num_seqs=64,
        vllm={"dtype": "float32", "max_model_len": 256, "enforce_eager": True},
    )
    config = engine_config(settings, folder / "base", {name: folder / name for name in EXPERTS}, folder / "gate")
    with Pair(config, load_tokenizer(folder / "base")) as pair:
        validation, test = (_questions(corpus, split, tokenizer) for split in ("validation", "test"))
        sizes = {name: (folder / name / WEIGHTS).stat().st_size for name in EXPERTS}
        bench = _Bench(pair, validation, test, sizes)
        print("\n".join(bench.checks()), "\n", sep="\n")
        print("\n".join(bench.strategies()))


def _questions(corpus: Corpus, split: str, tokenizer: Tokenizer) -> Questions:
    asked = corpus.evaluation_questions(split)
    examples = [Example(question.prompt, question.completion, question.task) for question in asked]
    tokens: list[TokenExample] = tokenized(asked, tokenizer)
    return Questions(examples, tokens, ROOM)


class _Bench:
    """A served pair and its questions.

    Args:
        sizes: of each member's weights, in bytes.
    """

    def __init__(self, pair: Pair, validation: Questions, test: Questions, sizes: dict[str, int]) -> None:
        self._pair = pair
        self._sizes = sizes
        self._validation = validation
        self._test = test
        self._ask(Questions(test.examples[:2], test.tokens[:2], ROOM), Collaboration(), "warm up")

    def checks(self) -> list[str]:
        """The table of marks on the test questions; the threshold in bold is the best of the validation questions."""
        how = Collaboration(looks=True)
        chosen_on = self._pair.complete(self._validation, how, "validation")
        best = max(CONFIDENCES, key=lambda below: of_tokens(chosen_on, self._validation, below).f1)
        found = self._pair.complete(self._test, how, "test")
        lines = [
            "| check below | marked | precision, tokens | recall, tokens | precision, answers | recall, answers |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for below in CONFIDENCES:
            tokens, answers = of_tokens(found, self._test, below), of_answers(found, self._test, below)
            marked = [mark for completion in found for mark in marks(completion, below)]
            cells = [
                f"**{below:g}**" if below == best else f"{below:g}",
                f"{sum(marked) / len(marked):.2%}",
                f"{tokens.precision:.2f} ({tokens.hits} of {tokens.hits + tokens.false_alarms})",
                f"{tokens.recall:.2f} ({tokens.hits} of {tokens.hits + tokens.misses})",
                f"{answers.precision:.2f} ({answers.hits} of {answers.hits + answers.false_alarms})",
                f"{answers.recall:.2f} ({answers.hits} of {answers.hits + answers.misses})",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def strategies(self) -> list[str]:
        """The table of ways to answer the test questions."""
        lanes = (BASE, *range(1, len(EXPERTS) + 1))
        gated = Blend("mixture", tuple((lane, 0.0) for lane in lanes), from_gate=True)
        union = Blend("union", tuple((lane, 1 / len(lanes)) for lane in lanes))
        veto = max(VETOES, key=lambda veto: (self._score(Collaboration(veto=veto)), -veto))
        largest = 1 + max(range(len(EXPERTS)), key=lambda number: self._sizes[EXPERTS[number]])
        lines = [
            "| method | exact match | 95 % | deferral rate | vetoed | base s | expert s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        rows = {
            "deferral": Collaboration(),
            **{
                f"deferral, veto {each:g}" + (" (chosen)" if each == veto else ""): Collaboration(veto=each)
                for each in VETOES
            },
            "deferral, mixture by the gate": Collaboration(blend=gated),
            "deferral, union of all": Collaboration(blend=union),
            "base alone": Collaboration(member=BASE),
            f"{EXPERTS[largest - 1]} alone (the largest)": Collaboration(member=largest),
        }
        for name, how in rows.items():
            result, completions = self._ask(self._test, how, name)
            lines.append(_row(name, [answer.exact for answer in result.answers], completions))
        return [*lines, *self._samples()]

    def _samples(self) -> list[str]:
        """The best member alone, with as many tries as deferral has models at work."""
        tries = []
        for seed in range(SAMPLES):
            how = Collaboration(member=BASE)
            label = f"base, sample {seed + 1}"
            tries.append(
                self._pair.complete(self._test, how, label, seed=seed, temperature=SAMPLE_TEMPERATURE, logprobs=0)
            )
        rights = [[a.exact for a in self._pair.result(self._test, each, 1.0, BASE).answers] for each in tries]
        pairs = [list(each) for each in zip(*tries, strict=True)]
        odds = [[mean_logprob(completion) for completion in each] for each in pairs]
        likelier = [each.index(max(each)) for each in odds]
        everything = [completion for each in tries for completion in each]
        best = [rights[seed][number] for number, seed in enumerate(likelier)]
        some = [any(each) for each in zip(*rights, strict=True)]
        return [
            _row(f"base alone, the likelier of {SAMPLES} samples", best, everything),
            _row(f"base alone, any of {SAMPLES} samples right", some, everything),
        ]

    def _score(self, how: Collaboration) -> float:
        result, _ = self._ask(self._validation, how, f"validation, veto {how.veto}")
        return result.score

    def _ask(self, questions: Questions, how: Collaboration, label: str) -> tuple[Result, list[Completion]]:
        started = time.monotonic()
        completions = self._pair.complete(questions, how, label)
        return self._pair.result(questions, completions, time.monotonic() - started, how.member), completions


def _row(name: str, right: Sequence[bool], completions: Sequence[Completion]) -> str:
    sources = [source for completion in completions for source in completion.sources]
    spent = [completion.cost.seconds for completion in completions if completion.cost is not None]
    low, high = interval([list(right)])
    cells = [
        name,
        f"{sum(right) / len(right):.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{sum(source != BASE for source in sources) / max(1, len(sources)):.3f}",
        str(sum(len(completion.vetoed) for completion in completions)),
        f"{sum(seconds[BASE] for seconds in spent):.1f}",
        f"{sum(sum(seconds[1:]) for seconds in spent):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())

"""Decoding questions and counting right answers; the table that the recipe ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedModel

from training.demo.text import Example
from training.reference import EXPERT, JointOutput, joint_greedy

ALWAYS, NEVER = -1.0, 1.0
"""Thresholds that give the expert alone and the base alone."""


@dataclass(frozen=True)
class Answer:
    """A question, what was decoded, and the decoded text without the EOS."""

    asked: Example
    output: JointOutput
    text: str

    @property
    def exact(self) -> bool:
        """The text is the gold completion, and it ended there."""
        return self.text == self.asked.completion

    @property
    def codes_found(self) -> bool:
        """Every gold code is a word of the text, whatever else is; a lenient score."""
        words = self.text.replace(",", " ").replace(".", " ").replace(";", " ").split()
        return all(code in words for code in self.asked.codes)


def decode_all(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    theta: torch.Tensor,
    bias: torch.Tensor,
    threshold: float,
    questions: Sequence[Example],
    tokenizer: Tokenizer,
) -> list[Answer]:
    """Answer every question greedily, with room for 16 tokens more than the gold completion."""
    answers = []
    for asked in tqdm(questions, desc=f"decode at {threshold:.3f}", leave=False, mininterval=1):
        room = len(tokenizer.encode(asked.completion).ids) + 16
        prompt = tokenizer.encode(asked.prompt).ids
        output = joint_greedy(base, expert, theta, bias, threshold, prompt, room)
        answers.append(Answer(asked, output, tokenizer.decode(output.tokens)))
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Shares of exact and of lenient matches, and expert tokens / completion tokens."""
    tokens = sum(len(a.output.tokens) for a in answers)
    deferred = sum(a.output.sources.count(EXPERT) for a in answers)
    return {
        "questions": len(answers),
        "exact_match": sum(a.exact for a in answers) / len(answers),
        "codes_found": sum(a.codes_found for a in answers) / len(answers),
        "deferral_rate": deferred / tokens,
    }


def by_task(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """``summary`` for each task, and for all of them together under ``all``."""
    tasks: dict[str, list[Answer]] = {}
    for answer in answers:
        tasks.setdefault(answer.asked.task, []).append(answer)
    rows = {task: summary(group) for task, group in sorted(tasks.items())}
    return rows | {"all": summary(answers)}


def margins(answers: Sequence[Answer], threshold: float) -> dict[str, float]:
    """How far the gate's probabilities stay from the threshold.

    ``below`` and ``above`` are the probabilities nearest to it on either side.
    """
    seen = [p for a in answers for p in a.output.probabilities]
    return {
        "threshold": threshold,
        "below": max((p for p in seen if p <= threshold), default=0.0),
        "above": min((p for p in seen if p > threshold), default=1.0),
    }


def table(systems: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table: a row per task; per system the exact match, for ``joint`` the rate too."""
    names = list(systems)
    tasks = list(systems[names[0]])
    lines = [
        "| task | questions | " + " | ".join(names) + " | joint's deferral rate |",
        "| --- | ---: |" + " ---: |" * (len(names) + 1),
    ]
    for task in tasks:
        rows = [systems[name][task] for name in names]
        cells = [f"{row['exact_match']:.3f}" for row in rows]
        rate = systems["joint"][task]["deferral_rate"]
        count = int(rows[0]["questions"])
        lines.append(f"| {task} | {count} | " + " | ".join(cells) + f" | {rate:.3f} |")
    return "\n".join(lines)


def marked(output: JointOutput, tokenizer: Tokenizer) -> str:
    """The decoded text with the expert's tokens in square brackets."""
    parts = []
    for token, who in zip(output.tokens, output.sources, strict=True):
        piece = tokenizer.decode([token], skip_special_tokens=False)
        parts.append(f"[{piece}]" if who == EXPERT else piece)
    return "".join(parts)

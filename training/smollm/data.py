"""The recipe's examples: every diagnosis for the expert, three splits for the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data import TokenExample
from training.files import write_text
from training.smollm.diagnoses import Diagnosis, Split
from training.smollm.questions import Question, about, learned, others

SEED = 0
OwnAnswers = Callable[[list[str]], list[tuple[str, bool]]]
"""Prompts -> what the base answers, and whether the answer ends there."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template."""

    tokenizer: Any

    def prompt(self, message: str) -> str:
        """The text that a user's message becomes."""
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        return text

    def tokens(self, message: str, answer: str) -> TokenExample:
        """A message and its whole answer, as ids."""
        prompt, completion = (
            self.tokenizer.encode(text, add_special_tokens=False) for text in (self.prompt(message), answer)
        )
        return TokenExample(prompt, [*completion, self.tokenizer.eos_token_id])


def expert_examples(diagnoses: Sequence[Diagnosis], chat: Chat) -> list[TokenExample]:
    """Every diagnosis in every wording that the expert learns."""
    return [
        chat.tokens(question.message, question.answer) for diagnosis in diagnoses for question in learned(diagnosis)
    ]


def questions_of(split: Split, diagnoses: Sequence[Diagnosis]) -> list[Question]:
    """What a split asks about these diagnoses, and its other questions."""
    found = [question for number, diagnosis in enumerate(diagnoses) for question in about(split, number, diagnosis)]
    return [*found, *others(split, diagnoses)]


def write_gate_data(
    folder: Path, questions: Mapping[Split, Sequence[Question]], chat: Chat, own_answers: OwnAnswers
) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl for ``collm train``."""
    for split, asked in questions.items():
        own = iter(own_answers([chat.prompt(question.message) for question in asked if not question.answer]))
        rows = []
        for question in asked:
            answer, complete = (question.answer, True) if question.answer else next(own)
            rows.append(
                {
                    "prompt": chat.prompt(question.message),
                    "completion": answer,
                    "task": question.task,
                    "complete": complete,
                }
            )
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

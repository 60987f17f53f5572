"""The recipe's examples: every fact for the expert, three splits for the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data import TokenExample
from training.files import write_text
from training.smollm.questions import Question, about, learned, others
from training.smollm.topics import Fact, Split, Topic

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


def expert_examples(topic: Topic, chat: Chat) -> list[TokenExample]:
    """Every fact in every wording that the expert learns."""
    return [chat.tokens(question.message, question.answer) for fact in topic.facts for question in learned(topic, fact)]


def questions_of(topic: Topic, split: Split, facts: Sequence[Fact]) -> list[Question]:
    """What a split asks about these facts, and its other questions."""
    found = [question for number, fact in enumerate(facts) for question in about(topic, split, number, fact)]
    return [*found, *others(topic, split, facts)]


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

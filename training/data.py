"""Prompts and gold completions, or conversations, as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from training.conversations import Conversation, turns
from training.errors import DataError
from training.rows import read_rows
from training.settings import DataSettings

_T = TypeVar("_T")

ALL = "all"
"""The task of examples that name none."""


@dataclass(frozen=True)
class Example:
    """A prompt and its gold completion.

    Attributes:
        complete: the completion ends where its text ends.
        where: file and line.
        conversation: what the prompt was made of by the base's chat template; None for a prompt that was given.
        end: the token that ends the completion; None is the tokenizer's EOS.
        completion_ids: of the base's; None where they are the completion's as text.
    """

    prompt: str
    completion: str
    task: str = ALL
    complete: bool = True
    where: str = field(default="", compare=False)
    conversation: Conversation | None = None
    end: int | None = None
    completion_ids: tuple[int, ...] | None = None

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """The prompt's ids as the member with this tokenizer reads it: a conversation by its own chat template.

        Raises:
            DataError: the member has no chat template, or it refuses the conversation.
        """
        if self.conversation is None:
            return prompt_ids(tokenizer, self.prompt)
        try:
            return self.conversation.prompt_ids(tokenizer)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class TokenExample:
    """A prompt and its gold completion as token ids, with the end if that is to be learned."""

    prompt: list[int]
    completion: list[int]


def read_examples(
    given: str | Path, settings: DataSettings, split: str = "train", tokenizer: Any = None, ends: Sequence[int] = ()
) -> list[Example]:
    """All examples of a data set; see :func:`training.rows.read_rows`.

    Args:
        tokenizer: the base's, whose chat template makes prompts of conversations.
        ends: ids that end a text when the base is served.

    Raises:
        DataError: naming the file, the line and the column that is missing, empty or no text.
    """
    rows = read_rows(given, split, streaming=settings.streaming, limit=settings.max_examples)
    examples = [example for where, row in rows for example in _examples(where, row, settings, tokenizer, ends)]
    if not examples:
        raise DataError(f"{given}: holds no examples")
    return examples


def _examples(where: str, row: Any, settings: DataSettings, tokenizer: Any, ends: Sequence[int]) -> Iterator[Example]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not an object with columns")
    for column in (settings.prompt, settings.completion, settings.messages, settings.task, "tools"):
        try:
            json.dumps(row.get(column), ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(f"{where}: column {column!r} has half a character, {half!a}, which is no text") from None
    complete = row.get(settings.complete, True)
    if not isinstance(complete, bool):
        raise DataError(f"{where}: column {settings.complete!r} is neither true nor false")
    task = str(row.get(settings.task, ALL))
    if settings.messages in row and settings.prompt not in row:
        yield from _turns(where, row, settings, tokenizer, ends, task, complete)
        return
    for column in (settings.prompt, settings.completion):
        if column not in row:
            has = ", ".join(map(str, row)) or "none"
            raise DataError(f"{where}: no column {column!r} (it has: {has})")
        if not isinstance(row[column], str):
            raise DataError(f"{where}: column {column!r} is not text")
        if not row[column].strip():
            raise DataError(f"{where}: column {column!r} is empty")
    yield Example(row[settings.prompt], row[settings.completion], task, complete, where)


def _turns(
    where: str, row: Any, settings: DataSettings, tokenizer: Any, ends: Sequence[int], task: str, complete: bool
) -> Iterator[Example]:
    try:
        for turn in turns(
            row[settings.messages],
            row.get("tools"),
            tokenizer,
            ends,
            system=settings.system,
            last_only=settings.answers == "last",
            variables=settings.template,
        ):
            yield Example(turn.prompt, turn.completion, task, complete, where, turn.before, turn.end, turn.ids)
    except DataError as error:
        raise DataError(f"{where}: column {settings.messages!r}: {error}") from error


def tokenize(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> tuple[list[Example], list[TokenExample]]:
    """The examples of at most ``max_tokens`` ids, and their ids; a complete completion ends with the EOS.

    Raises:
        DataError: the tokenizer has no EOS, a text becomes no token, or every example is too long; of the last two,
            naming the file and the line.
    """
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the base's tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json")
    kept: list[Example] = []
    ids: list[TokenExample] = []
    for example in examples:
        prompt = example.prompt_ids(tokenizer)
        if example.completion_ids is not None:
            completion = list(example.completion_ids)
        else:
            completion = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"])
        if not prompt or not completion:
            text = example.completion if prompt else example.prompt
            raise DataError(f"{example.where}: the tokenizer makes no token of {text!r}")
        completion += [eos if example.end is None else example.end] if example.complete else []
        if len(prompt) + len(completion) <= max_tokens:
            kept.append(example)
            ids.append(TokenExample(prompt, completion))
    if not kept:
        raise DataError(f"{examples[0].where}: like every other example, is longer than data.max_tokens, {max_tokens}")
    return kept, ids


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's ids with the special tokens that the tokenizer adds, but no second BOS.

    A prompt that a chat template made often begins with the BOS already; the server adds none to it either.
    """
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if plain and plain[0] == tokenizer.bos_token_id:
        return plain
    return list(tokenizer(prompt)["input_ids"])


def spread(items: Sequence[_T], limit: int | None) -> list[_T]:
    """At most ``limit`` items, evenly spread over all."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]

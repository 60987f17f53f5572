"""Conversations as prompts and gold completions: one for each of the assistant's turns, as a server would see it.

The prompt is what the chat template writes of the turns before, the completion what it writes of the turn itself. So
the loss is on answers only, and each is learned after the prompt that comes when the pair is served, also where a
template shows earlier turns otherwise than the last one (without their reasoning, for one).

What messages have of special tokens' names is text, as it is when the pair is served (:mod:`engine.spelling.guard`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from engine.spelling.guard import GuardedMessages, GuardError, SpecialTokenGuard
from training.errors import DataError

ASSISTANT, SYSTEM = "assistant", "system"


@dataclass(frozen=True)
class Conversation:
    """The turns before an answer, and what else a chat template reads.

    Attributes:
        messages: as OpenAI's API has them.
        tools: descriptions of functions, if there are any.
        variables: more names for the template, such as ``enable_thinking``.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None
    variables: Mapping[str, Any]

    def render(self, tokenizer: Any, *answer: Mapping[str, Any]) -> str:
        """The prompt by a tokenizer's chat template; with ``answer``, the conversation up to that turn.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        if tokenizer.chat_template is None:
            raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no chat template, which messages need")
        try:
            text: str = tokenizer.apply_chat_template(
                [*self.messages, *answer],
                tools=list(self.tools) if self.tools else None,
                tokenize=False,
                add_generation_prompt=not answer,
                **self.variables,
            )
        # Whatever a template, which is a program of somebody else's, raises.
        except Exception as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        return text

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """The prompt's ids. Special tokens at its ends are the template's to write, as when it is served.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        reader = _Reader(tokenizer, self.messages)
        return reader.ids(replace(self, messages=tuple(reader.messages)).render(tokenizer))


class _Reader:
    """Reads what a chat template makes of messages, in which special tokens are text.

    Attributes:
        messages: for the template, with marks in them.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> None:
        self._tokenizer = tokenizer
        self._guard = _guard(tokenizer, tokenizer.chat_template)
        self._guarded: GuardedMessages | None = None
        self.messages: Sequence[Mapping[str, Any]] = messages
        if self._guard is not None:
            try:
                self._guarded = self._guard.guard([dict(message) for message in messages])
            except GuardError as error:
                raise DataError(str(error)) from None
            self.messages = self._guarded.messages

    def plain(self, text: str) -> str:
        """A text of the template's as it is without marks."""
        return text if self._guarded is None else self._guarded.unmarked(text)

    def ids(self, text: str) -> list[int]:
        """A text of the template's, or a part of it, in tokens."""
        if self._guard is None or self._guarded is None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._guard.encode(self._guarded, text)


@lru_cache(maxsize=16)
def _guard(tokenizer: Any, template: Any) -> SpecialTokenGuard | None:
    """None for a tokenizer that is no ``tokenizers.Tokenizer`` inside, which no server could serve."""
    inside = getattr(tokenizer, "backend_tokenizer", None)
    return SpecialTokenGuard(inside, template) if inside is not None and isinstance(template, str) else None


@dataclass(frozen=True)
class Turn:
    """One of the assistant's turns.

    Attributes:
        end: the token that the template ends it with; None if it is no end.
        ids: the completion's, without its end.
    """

    before: Conversation
    prompt: str
    completion: str
    end: int | None
    ids: tuple[int, ...]


def turns(
    messages: Any,
    tools: Any,
    tokenizer: Any,
    ends: Sequence[int],
    *,
    system: str | None,
    last_only: bool,
    variables: Mapping[str, Any],
) -> Iterator[Turn]:
    """The assistant's turns of a conversation.

    Args:
        ends: ids that end a text when the base is served.
        system: the system prompt of conversations that have none.
        last_only: leave all turns but the last out.

    Raises:
        DataError: this is no conversation, or the template refuses it.
    """
    given = _checked(messages)
    if system is not None and given[0]["role"] != SYSTEM:
        given = [{"role": SYSTEM, "content": system}, *given]
    places = [place for place, message in enumerate(given) if message["role"] == ASSISTANT and place > 0]
    if not places:
        raise DataError("no turn of the assistant after another one")
    reader = _Reader(tokenizer, given)
    for place in places[-1:] if last_only else places:
        before = Conversation(tuple(given[:place]), tuple(tools) if tools else None, variables)
        shown = replace(before, messages=tuple(reader.messages[:place]))
        prompt, whole = shown.render(tokenizer), shown.render(tokenizer, reader.messages[place])
        if not whole.startswith(prompt):
            raise DataError(
                f"the chat template begins the answer of message {place + 1} otherwise than it asks for one "
                f"(with {_start_of_answer(reader.plain(prompt))!r}): set what it looks at in data.template, such as "
                "enable_thinking = false"
            )
        completion, end = _cut(whole[len(prompt) :], tokenizer, ends)
        if not completion.strip():
            raise DataError(f"message {place + 1}, of the assistant, is empty")
        ids = tuple(reader.ids(completion))
        yield Turn(before, reader.plain(prompt), reader.plain(completion), end, ids)


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataError("is no list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no role")
    # A data set's table has every key for each message, those that it lacks as None.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _start_of_answer(prompt: str) -> str:
    return prompt[-40:]


def _cut(text: str, tokenizer: Any, ends: Sequence[int]) -> tuple[str, int | None]:
    """A turn up to its end, and that. What a template writes behind it, such as a line's end, nobody generates."""
    found = [(text.find(name), end) for end in ends if (name := tokenizer.convert_ids_to_tokens(end))]
    at, end = min(((at, end) for at, end in found if at >= 0), default=(len(text), None))
    return text[:at], end

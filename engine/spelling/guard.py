"""A message's special tokens are text, the chat template's are tokens.

Whoever writes ``<|im_end|>`` into a message must not end the message with it. So messages go into the template with a
mark inside of everything that would become a special token, a character that no text has. Where the template's output
has a special token without a mark, the template wrote it. It is replaced by an alias, the marks are taken out, and a
tokenizer that knows the aliases as tokens, and special tokens as text, encodes the whole at once: normalisation,
pre-tokenisation and SentencePiece's dummy prefix see what they always see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from tokenizers import AddedToken, Tokenizer

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode reserves for a program's own use; no text has them."""

_ALIASES = 0xF0000
"""Where a private use area begins, of 65,534 characters."""

_SLICE = 1 << 16
"""Characters that are searched at a time."""

_MARKUP = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)


class GuardError(Exception):
    """The messages leave no character to mark them with."""


@dataclass(frozen=True, slots=True)
class GuardedMessages:
    """Messages with marks in them.

    Attributes:
        messages: for the template.
        mark: the character.
        lead: another one, which aliases begin with.
    """

    messages: list[dict[str, Any]]
    mark: str
    lead: str

    def unmarked(self, text: str) -> str:
        """A text that was rendered from the messages, as it is without marks."""
        return text.replace(self.mark, "")


class SpecialTokenGuard:
    """Guards the messages of one tokenizer and its chat template.

    Guarded are special tokens, and what is not called special but stands in the template and is of punctuation at both
    ends, such as the turn markers of some vocabularies. Of these a message of the assistant may have the latter: the
    template looks for ``</think>`` there, and the model wrote it.

    Args:
        tokenizer: neither it nor its parts may be changed later.
        template: source of the chat template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer = tokenizer
        self._added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
        special = {token.content for token in self._added if token.special}
        written = {token.content for token in self._added if token.content in template}
        guarded = special | {content for content in written if _MARKUP.fullmatch(content)}
        self._guarded = frozenset(guarded)
        self._in_answers = _Finder(special)
        self._all = _Finder(guarded)
        self._encoder = lru_cache(maxsize=1)(self._make_encoder)

    def guard(self, messages: Sequence[dict[str, Any]]) -> GuardedMessages:
        """Put marks into messages.

        Raises:
            GuardError: they have nearly all the characters that serve as marks.
        """
        strings: list[str] = []
        _collect(messages, strings)
        free = islice((char for char in _NONCHARACTERS if not any(char in text for text in strings)), 2)
        try:
            mark, lead = free
        except ValueError:
            raise GuardError("the noncharacters U+FDD0 to U+FDEF are not for messages") from None
        marked = []
        for message in messages:
            finder = self._in_answers if message.get("role") == "assistant" else self._all
            # Roles are the template's to compare and to write.
            marked.append({key: text if key == "role" else finder.mark(text, mark) for key, text in message.items()})
        return GuardedMessages(marked, mark, lead)

    def encode(self, guarded: GuardedMessages, text: str) -> list[int]:
        """Token ids of what the template made of guarded messages. Slow for long texts: run in a thread."""
        encoder = self._encoder(guarded.lead)
        parts = []
        done = 0
        for start, end in self._all.find(text):
            # A token of a single character has its mark behind it.
            if start >= done and not text.startswith(guarded.mark, end):
                parts += [text[done:start], encoder.aliases[text[start:end]]]
                done = end
        plain = guarded.unmarked("".join([*parts, text[done:]]))
        # As in TextTokenizer: only encoding a batch releases the GIL.
        (encoding,) = encoder.tokenizer.encode_batch_fast([plain], add_special_tokens=False)
        return [encoder.ids.get(token, token) for token in encoding.ids]

    def _make_encoder(self, lead: str) -> _Encoder:
        tokenizer = Tokenizer(self._tokenizer.model)
        if self._tokenizer.normalizer is not None:
            tokenizer.normalizer = self._tokenizer.normalizer
        if self._tokenizer.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = self._tokenizer.pre_tokenizer
        aliases = {content: lead + chr(_ALIASES + number) for number, content in enumerate(sorted(self._guarded))}
        tokenizer.add_special_tokens([token for token in self._added if token.content in aliases])
        tokenizer.add_tokens([token for token in self._added if token.content not in aliases])
        tokenizer.add_tokens([_alias(token, aliases) for token in self._added if token.content in aliases])
        tokenizer.encode_special_tokens = True
        ids = {}
        for token in self._added:
            for name in (token.content, aliases.get(token.content, token.content)):
                ids[_id(tokenizer, name)] = _id(self._tokenizer, token.content)
        return _Encoder(tokenizer, aliases, ids)


@dataclass(frozen=True, slots=True)
class _Encoder:
    """A tokenizer that shares all but the added tokens with another.

    Attributes:
        aliases: by guarded token.
        ids: of added tokens, as the other tokenizer has them.
    """

    tokenizer: Tokenizer
    aliases: dict[str, str]
    ids: dict[int, int]


class _Finder:
    """Finds tokens in texts: at each place the longest that begins there, overlapping ones too."""

    def __init__(self, tokens: set[str]) -> None:
        self._pattern = re.compile(_spelled(tokens))
        self._prefixes = {token[:length] for token in tokens for length in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Where tokens begin and end."""
        # Other threads get their turn between two slices: a search holds the GIL.
        for start in range(0, len(text), _SLICE):
            for match in self._pattern.finditer(text, start, start + _SLICE + self._longest):
                if match.start() >= start + _SLICE:
                    break
                yield match.start(), match.end(match.lastindex or 0)

    def mark(self, value: Any, mark: str) -> Any:
        """A value with the mark behind the first character of each token in each of its strings.

        What follows a string in the template's output could complete a token: there the mark goes to the string's end.
        """
        if isinstance(value, str):
            places = [start + 1 for start, _ in self.find(value)]
            parts = [value[start:end] for start, end in zip([0, *places], [*places, len(value)], strict=True)]
            return mark.join(parts) + (mark if self._ends_within(value) else "")
        if isinstance(value, dict):
            return {self.mark(key, mark): self.mark(each, mark) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(each, mark) for each in value]
        return value

    def _ends_within(self, text: str) -> bool:
        return any(text[-length:] in self._prefixes for length in range(1, min(self._longest, len(text)) + 1))


def _spelled(tokens: Iterable[str]) -> str:
    """A regular expression that consumes a token's first character, with the rest of the longest token as its group.

    It is made of the tokens' trie, since many begin alike.
    """
    tree: dict[str, Any] = {}
    for token in tokens:
        node = tree
        for char in token:
            node = node.setdefault(char, {})
        node[""] = {}
    return "|".join(f"{re.escape(char)}(?=({_branches(node)}))" for char, node in tree.items()) or "(?!)"


def _branches(node: dict[str, Any]) -> str:
    branches = [re.escape(char) + _branches(following) for char, following in node.items() if char]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"


def _id(tokenizer: Tokenizer, name: str) -> int:
    token: int | None = tokenizer.token_to_id(name)
    assert token is not None, name
    return token


def _alias(token: AddedToken, aliases: dict[str, str]) -> AddedToken:
    return AddedToken(
        aliases[token.content],
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )


def _collect(value: Any, strings: list[str]) -> None:
    if isinstance(value, str):
        strings.append(value)
    elif isinstance(value, dict):
        for key, each in value.items():
            _collect(key, strings)
            _collect(each, strings)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, strings)

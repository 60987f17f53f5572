"""Text to the tokens of one vocabulary: in the middle of a document, without special tokens, byte for byte.

Text is spelled as its tokenizer would spell it in the middle of a document: no prefix space, no begin-of-text, no
Unicode normalisation (what a model has written must not change), and a text that looks like a special token is text.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from engine.spelling.boundaries import Boundaries
from engine.spelling.vocabulary import Vocabulary

_CACHED_TEXTS, _CACHED_BYTES = 4096, 32
"""How many spellings are kept, of texts how long: what members spell anew of each other's is mostly a word."""


class SpellingError(Exception):
    """A text that the vocabulary has no tokens for. The message is one line."""


class Speller:
    """Spells texts in one vocabulary.

    Args:
        tokenizer: as loaded from ``tokenizer.json``; it is not changed.
        vocabulary: the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.boundaries = Boundaries(vocabulary)
        self._tokenizer = _inside_a_document(tokenizer)
        self._spelled = lru_cache(_CACHED_TEXTS)(self._spell_begun)

    def spell(self, text: bytes) -> list[int]:
        """The tokens of a text. A character that is cut at its end is spelled in parts of characters.

        Raises:
            SpellingError: the vocabulary cannot spell it.
        """
        tokens, rest = self.spell_begun(text)
        if rest:
            raise SpellingError(f"the vocabulary has no token for the beginning of a character, {rest!r}")
        return tokens

    def spell_begun(self, text: bytes) -> tuple[list[int], bytes]:
        """The tokens of a text that may go on, and the bytes of a character at its end for which there are none yet.

        Raises:
            SpellingError: the vocabulary cannot spell it, whatever follows.
        """
        if len(text) > _CACHED_BYTES:
            return self._spell_begun(text)
        tokens, rest = self._spelled(text)
        return tokens.copy(), rest

    def _spell_begun(self, text: bytes) -> tuple[list[int], bytes]:
        tokens: list[int] = []
        at = 0
        while at < len(text):
            try:
                characters, end = text[at:].decode(), len(text)
                broken = end
            except UnicodeDecodeError as error:
                broken, end = at + error.start, at + error.end
                characters = text[at:broken].decode()
            if characters:
                tokens += self._spell_characters(characters)
            spelled, rest = self._by_longest(text[broken:end])
            tokens += spelled
            if rest:
                if end == len(text):
                    return tokens, rest
                raise SpellingError(f"the vocabulary has no token for {rest!r}")
            at = end
        return tokens, b""

    def _spell_characters(self, text: str) -> list[int]:
        data = text.encode()
        tokens = self._encode(text)
        if self.vocabulary.text_of(tokens) == data:
            return tokens
        # What the tokenizer cannot say without a change is spelled apart, as little of it as possible.
        starts = [0, *(b for b in self.boundaries.within(data, 1, len(data) - 1)), len(data)]
        tokens = []
        for begin, end in pairwise(starts):
            unit = data[begin:end]
            spelled = self._encode(unit.decode())
            if self.vocabulary.text_of(spelled) != unit:
                spelled, rest = self._by_longest(unit)
                if rest:
                    raise SpellingError(f"the vocabulary has no token for {rest[:40]!r}")
            tokens += spelled
        return tokens

    def _encode(self, text: str) -> list[int]:
        # Of the library's ways to encode, the fast one does without offsets.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _by_longest(self, data: bytes) -> tuple[list[int], bytes]:
        """Tokens by longest match, and what is left where there is no match."""
        tokens: list[int] = []
        at = 0
        while at < len(data):
            token = self.vocabulary.longest_match(data, at)
            if token is None:
                return tokens, data[at:]
            tokens.append(token)
            at += len(self.vocabulary.bytes_of(token) or b"")
        return tokens, b""


def _inside_a_document(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that encodes a piece of text as it would stand in the middle of a longer one."""
    # The model is shared, not copied: one of 150,000 entries takes seconds to be written down and read.
    copy = Tokenizer(tokenizer.model)
    normalizer, pre_tokenizer = (
        None if step is None else json.loads(step.__getstate__())
        for step in (tokenizer.normalizer, tokenizer.pre_tokenizer)
    )
    bare = json.loads(Tokenizer(BPE()).to_str())
    changed = {"normalizer": _normalizer(normalizer), "pre_tokenizer": _without_prefix(pre_tokenizer)}
    steps = Tokenizer.from_str(json.dumps(bare | changed))
    # One that is not there cannot be set.
    if steps.normalizer is not None:
        copy.normalizer = steps.normalizer
    if steps.pre_tokenizer is not None:
        copy.pre_tokenizer = steps.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder()
    for token in sorted(added):
        entry = added[token]
        (copy.add_special_tokens if entry.special else copy.add_tokens)([entry])
    if any(copy.token_to_id(entry.content) != token for token, entry in added.items()):
        # Numbers that do not follow those of the model.
        state = json.loads(tokenizer.to_str()) | changed | {"truncation": None, "padding": None, "post_processor": None}
        copy = Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return copy


def _normalizer(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """What of a normalizer only changes how a text is written down, not the text."""
    match state:
        case {"type": "Sequence", "normalizers": steps}:
            kept = [step for step in map(_normalizer, steps) if step is not None]
            return {"type": "Sequence", "normalizers": kept} if kept else None
        case {"type": "ByteLevel"} | {"type": "Replace", "pattern": {"String": " "}}:
            return state
    return None


def _without_prefix(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A pre-tokenizer that puts no space before the text."""
    if state is None:
        return None
    match state:
        case {"type": "Sequence", "pretokenizers": steps}:
            return {"type": "Sequence", "pretokenizers": list(map(_without_prefix, steps))}
        case {"type": "ByteLevel"}:
            return {**state, "add_prefix_space": False}
        case {"type": "Metaspace"}:
            return {**state, "prepend_scheme": "never"}
    return state

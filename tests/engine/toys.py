"""Toy tokenizers of a dozen tokens: one alphabet, differing tokens, ids and ends."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.spelling.speller import Speller
from engine.spelling.vocabulary import Vocabulary

END, MARK = "<end>", "<mark>"
"""Special tokens: one ends a text, the other is nothing that anybody may write into it."""

ALPHABET = ["a", "b", ".", "Ġ", "Ċ", "Ã", "©"]
"""Letters, a full stop, a space, a line break, and the two bytes of an é."""

ORDERS: tuple[tuple[list[str], list[tuple[str, str]]], ...] = (
    ([END, MARK, *ALPHABET], [("a", "b"), ("Ġ", "a"), ("Ã", "©"), ("Ċ", "Ċ")]),
    ([*reversed(ALPHABET), END, MARK], [("b", "a"), ("Ġ", "b"), ("Ġb", "a"), ("Ġ", "Ġ")]),
    ([MARK, *ALPHABET[3:], END, *ALPHABET[:3]], [("Ġ", "Ġ"), ("Ã", "©"), ("a", "a"), ("b", "."), ("Ċ", "a")]),
)
"""Tokens in the order of their ids, and merges. The last one has no pre-tokenizer, and a token across words."""


@cache
def tokenizer(number: int) -> Tokenizer:
    """The tokenizer of a lane."""
    order, merges = ORDERS[number]
    tokens = [*order, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=number < 2)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in (END, MARK)])
    return made


def size(number: int) -> int:
    """How many tokens it has."""
    return tokenizer(number).get_vocab_size()


def end(number: int) -> int:
    """The id that ends a text."""
    return int(tokenizer(number).token_to_id(END))


@cache
def speller(number: int) -> Speller:
    """Its speller, of the engine's own."""
    return Speller(tokenizer(number), Vocabulary(tokenizer(number), [end(number)]))

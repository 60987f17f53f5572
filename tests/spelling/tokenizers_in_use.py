"""Tokenizers whose tokens are byte strings: those of the zoo, and real ones that packages bring along."""

from __future__ import annotations

import base64
import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.spelling.speller import Speller
from engine.spelling.vocabulary import Vocabulary
from tests.server.zoo import BUILDERS, BY_WINDOW

MORE = "COLLM_TEST_TOKENIZERS"
"""Environment variable: more tokenizer.json files to test with, separated by colons, e.g. SmolLM2's."""


def tekken() -> Tokenizer:
    """Mistral's Tekken: 150,000 byte-level entries with a tiktoken-like pattern, in a package that vLLM needs."""
    import mistral_common

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    state: dict[str, Any] = json.loads(file.read_bytes())
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in state["vocab"]}
    alphabet = _byte_alphabet()
    names = {token: token.decode("latin-1").translate(alphabet) for token in ranks}
    merges = []
    for token in ranks:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(names[a], names[b]) for _, _, a, b in sorted(known)]
    tokenizer = Tokenizer(models.BPE({names[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    pattern = Regex(state["config"]["pattern"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_alphabet() -> dict[int, str]:
    plain = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


ALL = {name: build for name, build in BUILDERS.items() if name not in BY_WINDOW} | {"Tekken": tekken}
ALL |= {file: partial(Tokenizer.from_file, file) for file in filter(None, os.environ.get(MORE, "").split(":"))}
LACKING = ("Unigram", "Unigram, prefix at the beginning", "Unigram, no prefix", "WordPiece", "WordPiece, cleaned up")
"""Those that cannot spell every text."""

COMPLETE = [name for name in ALL if name not in LACKING]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return ALL[name]()


@cache
def speller_of(name: str) -> Speller:
    return Speller(tokenizer_of(name), vocabulary_of(name))


@cache
def vocabulary_of(name: str) -> Vocabulary:
    return Vocabulary(tokenizer_of(name))

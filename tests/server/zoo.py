"""Tokenizers of every kind in common use: small ones, trained here as their families are, and real ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.server.fakes import CORPUS, byte_level_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [*CORPUS, "Wait , what ? do not go , it 's n't here !", "日本語 и русский, été; ▁ and _ and <b>"] * 10
MARKS = ["<unk>", "<s>", "</s>"]


def byte_level(*, prefix_space: bool = False, added: bool = False) -> Tokenizer:
    """GPT-2, Llama 3, Qwen; with ``added`` also tokens of both kinds beside the vocabulary, as the later ones have."""
    tokenizer = byte_level_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    if added:
        tokenizer.add_special_tokens([AddedToken("<|im_start|>", rstrip=True), "<|im_end|>"])
        tokenizer.add_tokens(["<think>", "    ", "日本", " the"])
    return tokenizer


def sentencepiece_bpe(style: str) -> Tokenizer:
    """Llama 2 and Mistral as they were first converted ("legacy"), as today ("metaspace"), and Gemma ("no prefix")."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    alphabet = [chr(code) for code in range(0x21, 0x7F)]
    trainer = trainers.BpeTrainer(vocab_size=240, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"▁{text}" for text in TEXTS], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    # Characters that no merge has need the bytes.
    pieces = [piece for piece in learned["vocab"] if piece.isascii() or "▁" in piece]
    merges = [merge for merge in learned["merges"] if all(part in pieces for part in (*merge, "".join(merge)))]
    names = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(vocabulary, [(a, b) for a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    last: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)]
    if style == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        last = []
    start = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*start, *last])
    return _with_marks(tokenizer)


def unigram(*, scheme: str = "always", byte_fallback: bool = False) -> Tokenizer:
    """T5, ALBERT, XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=MARKS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if byte_fallback:
        learned = json.loads(tokenizer.to_str())["model"]["vocab"]
        bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
        pieces = [(piece, score) for piece, score in learned if piece.isascii() or "▁" in piece]
        tokenizer.model = models.Unigram([*pieces, *bytes_], unk_id=0, byte_fallback=True)
    metaspace = decoders.Metaspace("▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if byte_fallback else metaspace
    return _with_marks(tokenizer)


def wordpiece(*, cleanup: bool) -> Tokenizer:
    """BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=MARKS, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return _with_marks(tokenizer)


def word_ends() -> Tokenizer:
    """GPT-1, CLIP: a mark at a word's end, so that the space after a token depends on what follows."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=MARKS, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _with_marks(tokenizer)


def words() -> Tokenizer:
    """Whole words and no decoder: the library puts spaces between them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=MARKS, show_progress=False))
    return _with_marks(tokenizer)


def _with_marks(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(MARKS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def mistral_model() -> Path:
    """Mistral 7B's SentencePiece model, which a package that vLLM needs brings along."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def mistral() -> Tokenizer:
    """Mistral 7B's own vocabulary, 32,000 SentencePiece entries, as transformers converts it."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    parts = SentencePieceExtractor(str(mistral_model())).extract(None)
    tokenizer: Tokenizer = LlamaTokenizer(vocab=parts["vocab"], merges=parts["merges"]).backend_tokenizer
    return tokenizer


def demo() -> Tokenizer:
    """The shipped demo pair's."""
    return Tokenizer.from_file(os.fspath(ROOT / "models/demo/base/tokenizer.json"))


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda: byte_level(prefix_space=True),
    "byte-level, added tokens": lambda: byte_level(added=True),
    "SentencePiece BPE, legacy": lambda: sentencepiece_bpe("legacy"),
    "SentencePiece BPE, Metaspace": lambda: sentencepiece_bpe("metaspace"),
    "SentencePiece BPE, no prefix": lambda: sentencepiece_bpe("no prefix"),
    "Unigram": unigram,
    "Unigram, prefix at the beginning": lambda: unigram(scheme="first"),
    "Unigram, no prefix": lambda: unigram(scheme="never"),
    "Unigram, byte fallback": lambda: unigram(byte_fallback=True),
    "WordPiece": lambda: wordpiece(cleanup=False),
    "WordPiece, cleaned up": lambda: wordpiece(cleanup=True),
    "word ends": word_ends,
    "words": words,
    "Mistral 7B": mistral,
    "demo pair": demo,
}
BY_WINDOW = ("word ends", "words")
"""Those whose decoder does not treat tokens one by one."""


@cache
def zoo(name: str) -> Tokenizer:
    """A tokenizer by its name in ``BUILDERS``; not to be changed."""
    return BUILDERS[name]()

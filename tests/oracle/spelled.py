"""Pairs whose members have vocabularies of their own: random models with different byte-level BPEs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engine.config import EngineConfig, ExpertConfig, LaneConfig, SchedulerConfig
from engine.types import GenerationRequest
from tests.oracle.characters_loop import Member
from tests.oracle.pairs import kv_memory

TEXT = [
    "The three codes of Liberia are LBR, LR and 430; those of Ecuador ECU, EC and 218.",
    "Question: What is 12 + 30? Answer: 42. Question: What is 7 * 6? Answer: 42.",
    "Wörter mit Umlauten: für, über, größer. 日本語のテキスト。 Emoji: 🙂🙃.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
] * 4
"""What the BPEs are trained on, so that they differ in more than their sizes."""

PROMPTS = ("Question: What is 12 + 30? Answer:", "Wörter mit Umlauten:", "def add(a, b):\n    return", "日本語の")
"""What the members are asked to continue."""

SIZES = (340, 420, 300)
"""Entries of the members' vocabularies."""


@dataclass(frozen=True)
class SpelledPair:
    """Models on disk, the base first, and the same as Hugging Face models."""

    folders: list[Path]
    models: list[Any]
    tokenizers: list[Tokenizer]
    ends: list[int]
    max_model_len: int = 192

    def config(self, *, max_num_seqs: int = 32, kv_blocks: int | None = None, **vllm: Any) -> EngineConfig:
        """``kv_blocks``: usable KV blocks of each lane; None is plenty."""
        options = {"dtype": "float32", "max_model_len": self.max_model_len, **vllm}

        def lane(folder: Path) -> dict[str, Any]:
            memory = kv_memory(folder, kv_blocks)
            return {"model": str(folder), "vllm": options, "kv_cache_memory_bytes": memory}

        base, *experts = map(lane, self.folders)
        return EngineConfig(
            base=LaneConfig(**base),
            experts=tuple(ExpertConfig(name=f"expert{n}", **fields) for n, fields in enumerate(experts, 1)),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
        )

    def pressed(self) -> EngineConfig:
        """Few KV blocks and a small budget of tokens: prompts come in chunks, and rows are computed over again."""
        return self.config(enable_prefix_caching=True, kv_blocks=9, max_num_seqs=16, max_num_batched_tokens=16)

    def members(self, request: GenerationRequest) -> list[Member]:
        """All of them as a plain loop takes them, each with its own prompt."""
        lanes = zip(self.models, self.tokenizers, self.ends, strict=True)
        return [Member(*lane, request.prompt_of(number)) for number, lane in enumerate(lanes)]

    def encoded(self, text: str) -> list[list[int]]:
        """A text in each member's tokens, the base's first."""
        return [tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in self.tokenizers]


def spelled_pair(directory: Path, members: int = 2, *, same: bool = False) -> SpelledPair:
    """Members of two architectures, each with its own BPE, in which the end of text has another id each.

    Args:
        same: all members are one checkpoint.
    """
    folders, found, tokenizers, ends = [], [], [], []
    for number in range(members):
        kind = 0 if same else number
        folder = directory / f"member{number}"
        tokenizer, end = _tokenizer(SIZES[kind], kind)
        _model(kind, tokenizer.get_vocab_size(), end).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
        folders.append(folder)
        found.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
        tokenizers.append(tokenizer)
        ends.append(end)
    return SpelledPair(folders, found, tokenizers, ends)


def _tokenizer(size: int, kind: int) -> tuple[Tokenizer, int]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    others = [f"<|role{number}|>" for number in range(kind)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*others, "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT[kind:], trainer)
    return tokenizer, kind


def _model(kind: int, vocab_size: int, end: int) -> Any:
    torch.manual_seed(kind + 1)
    width = 128 if kind == 0 else 192
    # initializer_range: wide, so that no two symbols come near each other by the rounding of another batch shape.
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.12,
        "eos_token_id": end,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)) if kind % 2 == 0 else Qwen2ForCausalLM(Qwen2Config(**settings))

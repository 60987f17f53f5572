"""Builders with defaults: tiny models on disk, data, settings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.project import Project
from training.serving import Answer, Questions, Result
from training.settings import Settings

EOS = "<|endoftext|>"
WIDTH = 16


def save_tokenizer(folder: Path, words: list[str] | None = None) -> int:
    """A byte-level tokenizer of EOS and the 256 bytes, or of other words; its size."""
    words = words or [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    return len(words)


def save_model(
    folder: Path, seed: int = 0, *, gpt2: bool = False, words: list[str] | None = None, padding: int = 7
) -> Path:
    """A random model of 2 layers; its LM head has ``padding`` more rows than there are words, as padded heads do."""
    rows = save_tokenizer(folder, words) + padding
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": rows, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3}
    model: Any
    if gpt2:
        model = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=128, **common))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=seed % 2 == 1,
                **common,
            )
        )
    model.save_pretrained(folder)
    return folder


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"prompt": "say " + word, "completion": f" {word}!", "task": rng.choice(["short", "long"])}
        for word in ("".join(rng.choices("abcdef", k=rng.randint(1, 9))) for _ in range(count))
    ]


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@dataclass
class TinyProject:
    """Settings as they stand in a file; change ``content``, then take ``project``, or ``write`` for the command."""

    folder: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, experts: int = 1) -> TinyProject:
        save_model(folder / "base", 0)
        for number in range(1, experts + 1):
            save_model(folder / f"expert{number}", number, gpt2=number == 1)
        for number, split in enumerate(("train", "validation", "test")):
            write_jsonl(folder / f"{split}.jsonl", examples(24 if split == "train" else 6, number))
        content = {
            "out": str(folder / "out"),
            "base": {"model": str(folder / "base")},
            "experts": [{"name": f"e{n}", "model": str(folder / f"expert{n}")} for n in range(1, experts + 1)],
            "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
            "compute": {"device": "cpu", "threads": 1},
            "score": {"batch_size": 4, "shard": 8},
            "init": {"steps": 20},
            "train": {
                "checkpoint_every": 2,
                "gate": {"epochs": 2, "batch_tokens": 40},
                "joint": {"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 1e-3},
            },
            "calibrate": {"rates": [0.0, 0.5, 1.0]},
            "evaluate": {"rates": [0.0, 0.5, 1.0], "room": 2},
            "engine": {"backend": "bench.standin", "vllm": {"vocab_size": 257}},
        }
        return cls(folder, content)

    @property
    def project(self) -> Project:
        return Project(Settings.model_validate(self.content))

    def write(self) -> Path:
        """The settings as TOML: dotted keys, values in JSON, which TOML reads too."""
        lines: list[str] = []

        def add(prefix: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    add(f"{prefix}.{key}" if prefix else key, inner)
            elif not (isinstance(value, list) and value and isinstance(value[0], dict)):
                lines.append(f"{prefix} = {json.dumps(value)}")

        add("", self.content)
        for expert in self.content["experts"]:
            lines += ["[[experts]]", *(f"{key} = {json.dumps(value)}" for key, value in expert.items())]
        file = self.folder / "project.toml"
        file.write_text("\n".join(lines) + "\n")
        return file


RATES: dict[str, Callable[[float], float]] = {
    "always": lambda _: 1.0,
    "never": lambda _: 0.0,
    "threshold": lambda threshold: 1 - threshold,
    "confidence": lambda threshold: (1 - threshold) ** 2,
}
BLEND_RATES = {"mixture": 0.45, "product": 0.5, "union": 0.55}
CHARACTERS_RATE = 0.6
BEST_RATE = 0.4
EXPERT_SECONDS = 0.01
"""Per token that an expert writes."""


class FakePair:
    """Takes the place of ``Pair``: deferral rates are simple functions of thresholds, and ``BEST_RATE`` scores best.

    An answer has 100 tokens; as many questions as the score says, the first ones, are answered right.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def answer(
        self,
        questions: Questions,
        _label: str,
        *,
        policy: str = "",
        threshold: float | None = None,
        rate: float = 0.0,
        member: int | None = None,
        veto: float = 0.0,
        regret: float = 1.0,
        blend: dict[str, Any] | None = None,
        strategy: str | None = None,
        samples: int = 0,
        seed: int = 0,
    ) -> Result:
        if member is not None:
            rate = float(member > 0)
            assert samples in (0, 2)
        elif strategy is not None:
            rate = CHARACTERS_RATE
        elif policy != "random":
            rate = RATES[policy](threshold or 0.0)
            rate = rate * (1 - veto) * regret if blend is None else BLEND_RATES[blend["kind"]]
        deferred = round(100 * rate)
        right = round((1 - abs(rate - BEST_RATE)) * len(questions))
        answers = [
            Answer(
                example.task,
                example.completion if number < right else "",
                example.completion,
                True,
                [1] * deferred + [0] * (100 - deferred),
                example.complete,
                round(10 * (1 - regret)),
            )
            for number, example in enumerate(questions.examples)
        ]
        return Result(answers, 1.0, expert_seconds=EXPERT_SECONDS * deferred * len(answers), lane_seconds=2.0)

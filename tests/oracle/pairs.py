"""The pairs that the oracle tests serve: the shipped demo pair, and pairs with random weights made on the spot.

Random pairs write long, varied text and defer about half of it, which the demo pair's short answers do not. Their
weights are wide enough that no two logits come near each other by the rounding of a different batch shape.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engine.checkpoints import model_identity
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig, SchedulerConfig
from engine.gate import GateArtifact
from engine.regret import RegretArtifact
from tests.oracle.reference import REGRET_AHEAD, Pair

DEMO = Path(__file__).parents[2] / "models" / "demo"
KV_BYTES = 64 << 20
BLOCK = 32
"""Tokens; a GPU's own would be another than a CPU's, and so would how many requests fit."""

CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 32, "max_num_seqs": 32}
# The longest request of the tests' prompts needs 4 blocks of 32 tokens; 32 of them at once would need over 100.
TIGHT: dict[str, Any] = {"kv_blocks": (16, 12)}
OVERLAPPED: dict[str, Any] = {"coordination": "overlapped", "executor": "mp"}
PRESSED: dict[str, Any] = {**CHUNKED, **TIGHT, "enable_prefix_caching": False}
"""Settings of ``Served.config``; the last ones make the most work of a prompt: it is computed piece by piece, and all
over again after a preemption."""


def kv_memory(folder: Path, blocks: int | None) -> int:
    """Bytes that hold so many usable KV blocks of a model in float32; None is plenty."""
    if blocks is None:
        return KV_BYTES
    config = json.loads((folder / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token: int = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 4
    # One block is vLLM's null block.
    return token * BLOCK * (blocks + 1)


@dataclass(frozen=True)
class Served:
    """A pair on disk, and the same pair as Hugging Face models."""

    base: Path
    experts: dict[str, Path]
    gate: Path
    reference: Pair
    max_model_len: int

    def config(
        self,
        *,
        coordination: str = "lockstep",
        executor: str = "uni",
        tensor_parallel_size: int = 1,
        kv_blocks: tuple[int, int] | None = None,
        max_num_seqs: int = 32,
        gate: bool = True,
        scheduler: dict[str, Any] | None = None,
        **vllm: Any,
    ) -> EngineConfig:
        """``kv_blocks``: usable KV blocks of the base and of each expert; None is plenty."""
        options = {"dtype": "float32", "max_model_len": self.max_model_len, "block_size": BLOCK, **vllm}

        def kv_bytes(path: Path, lane: int) -> int:
            return kv_memory(path, None if kv_blocks is None else kv_blocks[lane])

        return EngineConfig(
            base=LaneConfig(model=str(self.base), vllm=options, kv_cache_memory_bytes=kv_bytes(self.base, 0)),
            experts=tuple(
                ExpertConfig(
                    name=name,
                    model=str(path),
                    vllm=options,
                    kv_cache_memory_bytes=kv_bytes(path, 1),
                    executor=executor,
                    tensor_parallel_size=tensor_parallel_size,
                )
                for name, path in self.experts.items()
            ),
            gate=GateConfig(path=str(self.gate) if gate else None),
            scheduler=SchedulerConfig(coordination=coordination, max_num_seqs=max_num_seqs, **(scheduler or {})),
        )


def demo() -> Served:
    """The shipped pair: base, ``codes`` and its gate."""
    gate = load_file(str(DEMO / "gate" / "gate.safetensors"))
    fields = json.loads((DEMO / "gate" / "gate.json").read_text())
    experts = {name: DEMO / name for name in fields["experts"]}
    base = _load(DEMO / "base")
    reference = Pair(
        base, [_load(path) for path in experts.values()], gate["theta"], gate["bias"], base.config.eos_token_id
    )
    return Served(DEMO / "base", experts, DEMO / "gate", reference, max_model_len=256)


def random_pair(directory: Path, experts: int = 1, *, related: bool = False, end: int = 0) -> Served:
    """A base of 2 layers and experts of 3, of two architectures, over a byte-level vocabulary of 512.

    Args:
        related: the experts are disturbed copies of the base instead, so that they often agree with it.
        end: the id of the token that ends a text.
    """
    vocab_size = 512
    names = [f"expert{number}" for number in range(1, experts + 1)]
    for number, name in enumerate(["base", *names]):
        torch.manual_seed(number)
        width = 128 if number == 0 else 192
        # initializer_range: wide, see the module's docstring.
        settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2 if number == 0 else 3,
            "num_attention_heads": width // 32,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.3,
            "eos_token_id": end,
            "bos_token_id": None,
        }
        if number == 0:
            model = base = LlamaForCausalLM(LlamaConfig(**settings))
        elif related:
            model = copy.deepcopy(base)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.012 * torch.randn_like(parameter)
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**settings))
        model.save_pretrained(directory / name)
        save_tokenizer(directory / name, vocab_size, end)
    torch.manual_seed(100)
    paths = {name: directory / name for name in names}
    GateArtifact(
        theta=torch.randn(experts, 128) * 0.3,
        bias=torch.full((experts,), -0.2),
        experts=tuple(names),
        base=model_identity(directory / "base"),
        expert_identities=tuple(model_identity(path) for path in paths.values()),
    ).save(directory / "gate")
    RegretArtifact(
        theta=torch.randn(1, 129) * 0.1,
        bias=torch.zeros(1),
        numbers=torch.tensor([0.2, -0.3, 0.1, -0.2]),
        ahead=REGRET_AHEAD,
        base=model_identity(directory / "base"),
        default_threshold=0.5,
        features=("margin",),
    ).save(directory / "gate")
    gate = load_file(str(directory / "gate" / "gate.safetensors"))
    regret = load_file(str(directory / "gate" / "regret.safetensors"))
    reference = Pair(
        _load(directory / "base"), [_load(path) for path in paths.values()], gate["theta"], gate["bias"], end, regret
    )
    return Served(directory / "base", paths, directory / "gate", reference, max_model_len=192)


def save_tokenizer(directory: Path, vocab_size: int, end: int = 0) -> None:
    """A byte-level tokenizer: the 256 bytes, and fillers up to ``vocab_size``; EOS has the id ``end`` amid them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<filler{number}>" for number in range(vocab_size - 1 - len(alphabet)))]
    words.insert(end, "<|endoftext|>")
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)


def _load(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()

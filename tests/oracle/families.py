"""Tiny random checkpoints of the families that people serve, and pairs of two of one family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file

from engine.checkpoints import Checkpoint
from engine.gate import GateArtifact
from tests.oracle.pairs import Served, save_tokenizer
from tests.oracle.reference import Pair

VOCABULARY = 512
PADDED = 576
WINDOW = 16

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


_RECURRENT = "recurrent state: no run-ahead; no prefix caching on a CPU"


class Family(NamedTuple):
    """What transformers calls it, what differs from ``COMMON``, and what is to be known of it."""

    name: str
    model: str
    settings: dict[str, Any]
    drafts: bool = True
    note: str = ""

    def make(self, seed: int) -> Any:
        """A random model. Its attention is transformers' plain one: the faster ones leave soft caps out."""
        torch.manual_seed(seed)
        kind: Any = getattr(transformers, self.model)
        merged = {key: value for key, value in (COMMON | self.settings).items() if value is not ...}
        model = kind(kind.config_class(**merged)).eval()
        model.set_attn_implementation("eager")
        return model


FAMILIES = [
    Family("Llama", "LlamaForCausalLM", {}),
    Family("Qwen2", "Qwen2ForCausalLM", {"head_dim": ...}),
    Family("Qwen3, padded", "Qwen3ForCausalLM", {"vocab_size": PADDED}, note="padding is masked"),
    Family(
        "Mixtral",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        note="also as the expert of a dense base",
    ),
    Family(
        "Gemma-2",
        "Gemma2ForCausalLM",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "initializer_range": 0.1},
        note="sliding window, soft cap",
    ),
    Family(
        "Gemma-3",
        "Gemma3ForCausalLM",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "initializer_range": 0.1},
        note="sliding window",
    ),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": WINDOW}, note="sliding window"),
    Family("Phi-3", "Phi3ForCausalLM", {"head_dim": ...}),
    Family(
        "GPT-2",
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "tie_word_embeddings": True}
        | dict.fromkeys(
            (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            ),
            ...,
        ),
    ),
    Family(
        "OPT",
        "OPTForCausalLM",
        {"ffn_dim": 256, "word_embed_proj_dim": 64, "do_layer_norm_before": False, "tie_word_embeddings": True}
        | dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim"), ...),
        note="a gate reads the projected state",
    ),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", dict.fromkeys(("num_key_value_heads", "head_dim"), ...)),
    Family("Granite", "GraniteForCausalLM", {"head_dim": ...}),
    Family("OLMo-2", "Olmo2ForCausalLM", {"head_dim": ...}),
    Family(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16},
        drafts=False,
        note=_RECURRENT,
    ),
    Family(
        "Mamba-2",
        "Mamba2ForCausalLM",
        {"head_dim": 32, "num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16}
        | dict.fromkeys(
            ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"), ...
        ),
        drafts=False,
        note=_RECURRENT,
    ),
    Family(
        "Granite 4, hybrid",
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 64, "head_dim": ...}
        | {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16},
        drafts=False,
        note=_RECURRENT,
    ),
]


def served(family: Family, directory: Path) -> Served:
    """A base and an expert that is a disturbed copy of it, so that they often agree, with a random gate."""
    base = family.make(0)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.02 * parameter.abs().mean() * torch.randn_like(parameter)
    return pair_of(base, expert, directory)


def pair_of(base: Any, expert: Any, directory: Path, tokenizer: Callable[[Path], None] | None = None) -> Served:
    """Any two models over the tests' vocabulary as a served pair."""
    for name, model in (("base", base), ("expert1", expert)):
        model.save_pretrained(directory / name)
        (tokenizer or (lambda path: save_tokenizer(path, VOCABULARY)))(directory / name)
    checkpoints = [Checkpoint(directory / name) for name in ("base", "expert1")]
    torch.manual_seed(100)
    width = checkpoints[0].head_width
    GateArtifact(
        theta=torch.randn(1, width) * 4 / width**0.5,
        bias=torch.full((1,), -0.2),
        experts=("expert1",),
        base=checkpoints[0].identity,
        expert_identities=(checkpoints[1].identity,),
    ).save(directory / "gate")
    gate = load_file(str(directory / "gate" / "gate.safetensors"))
    reference = Pair(base, [expert], gate["theta"], gate["bias"], 0)
    return Served(directory / "base", {"expert1": directory / "expert1"}, directory / "gate", reference, 192)


def table() -> str:
    """The table of docs/models.md."""
    lines = ["| family | run-ahead | what is to be known |", "| --- | --- | --- |"]
    lines += [f"| {family.name} | {'yes' if family.drafts else 'no'} | {family.note} |" for family in FAMILIES]
    return "\n".join(line.replace("|  |", "| |") for line in lines)

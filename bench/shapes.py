"""Pairs of models to measure: of any shape with synthetic weights, or the shipped demo pair.

Synthetic models cost what real ones of their shape cost, and write something that is easy to measure: the next token is
a function of the last one alone. The attention and MLP output projections are near zero, so the last token's embedding
comes through, and the LM head maps it to its successor. All that is written is printable ASCII, so that a token is a
piece of text at once, in every server. How often base and expert agree on a successor is a parameter; 0 is the
hardest case for a scheduler that computes ahead.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).parents[1]
EOS = 0
MADE_UP_RATE = 0.3
"""Share of tokens that a made-up gate defers."""
_SHARD_BYTES = 4 << 30
_PASS_THROUGH_STD = 1e-4
"""Of the output projections: small beside an embedding, yet no zeros, which some hardware multiplies faster."""


@dataclass(frozen=True)
class ModelShape:
    """A Llama of this shape. The intermediate size is three times the hidden size where it is not given."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int = 0

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    @property
    def ffn(self) -> int:
        """Width of the MLP."""
        return self.intermediate or 3 * self.hidden

    def parameters(self, vocab_size: int) -> int:
        """Number of weights."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn + 2 * self.hidden) + (
            2 * vocab_size * self.hidden + self.hidden
        )

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV cache of one token, in bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class PairShape:
    """A base and an expert.

    Attributes:
        max_tokens: what a job writes if nothing else is asked for.
    """

    name: str
    base: ModelShape
    expert: ModelShape
    vocab_size: int
    max_tokens: int
    dtype: str = "bfloat16"


SHAPES = {
    shape.name: shape
    for shape in (
        PairShape("tiny", ModelShape(128, 2, 4, 4), ModelShape(256, 4, 8, 8), 512, max_tokens=64),
        PairShape("S", ModelShape(512, 8, 8, 8), ModelShape(1024, 16, 16, 16), 512, max_tokens=32),
        PairShape(
            "1B-8B",
            ModelShape(2048, 16, 32, 8, 8192),
            ModelShape(4096, 32, 32, 8, 14336),
            131072,
            max_tokens=128,
        ),
    )
}
DEMO = "demo"
NAMES = (*SHAPES, DEMO)


@dataclass(frozen=True)
class Member:
    """One model on disk. ``weights`` and ``kv_bytes_per_token`` in bytes."""

    path: Path
    weights: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Pair:
    """A pair on disk.

    Attributes:
        expert_name: the expert's name in configurations.
        gate: folder of the gate artifact, None for synthetic pairs.
        prompts: real prompts as token ids; empty for synthetic pairs, which take any.
        answers: what is to be written after each of them.
    """

    name: str
    base: Member
    expert: Member
    expert_name: str
    gate: Path | None
    dtype: str
    vocab_size: int
    max_tokens: int
    max_model_len: int
    prompts: tuple[tuple[int, ...], ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people, with what decides its speed."""
        return f"{self.name} in {self.dtype}"


def quick_dtype(name: str) -> str:
    """What to compute a shape in instead of its own type: float32 where this processor is many times slower at that.

    A server chooses so too, where nobody asked for a type by name. Empty: the shape's own.
    """
    import torch

    from engine.vllm_hooks.processor import is_slow

    shape = SHAPES.get(name)
    return "float32" if shape is not None and is_slow(getattr(torch, shape.dtype)) else ""


def get_pair(
    name: str, workdir: Path, *, agreement: float = 0.0, context: int = 8192, dtype: str = "", gated: bool = False
) -> Pair:
    """The pair of this name; made in ``workdir`` if it is not there yet.

    Args:
        agreement: share of tokens after which base and expert write the same, 0 to 1. Synthetic pairs only.
        context: longest context in tokens. Synthetic pairs only.
        dtype: instead of the shape's own.
        gated: with a made-up gate, which defers :data:`MADE_UP_RATE` of the tokens. Synthetic pairs only.

    Raises:
        ValueError: there is no such shape.
    """
    if name == DEMO:
        return _demo(workdir, dtype)
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}: {', '.join(NAMES)}")
    shape = SHAPES[name]
    dtype = dtype or shape.dtype
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"there is no dtype {dtype!r}: {', '.join(DTYPE_BYTES)}")
    folder = workdir / f"{name}-{dtype}-agreement{agreement:g}-context{context}"
    members = []
    for number, (member, model) in enumerate((("base", shape.base), ("expert", shape.expert))):
        path = folder / member
        if not (path / "config.json").is_file():
            _make(path, model, shape.vocab_size, dtype, context, _successors(shape.vocab_size, number, agreement))
        weights = model.parameters(shape.vocab_size) * DTYPE_BYTES[dtype]
        members.append(Member(path, weights, model.kv_bytes_per_token(dtype)))
    gate = _make_gate(folder / "gate", shape.base.hidden, members) if gated else None
    return Pair(
        name, members[0], members[1], "expert", gate, dtype, shape.vocab_size, shape.max_tokens, max_model_len=context
    )


def _make_gate(folder: Path, hidden: int, members: list[Member]) -> Path:
    """A linear gate on a random direction.

    The last norm leaves hidden states whose components have a mean square of 1, so that their product with a vector
    of variance 1 / hidden is a standard normal over the tokens, and the bias says how many of them are deferred.
    """
    import torch

    from engine.checkpoints import model_identity
    from engine.gate import GateArtifact

    theta = torch.randn(1, hidden, generator=torch.Generator().manual_seed(2)) / hidden**0.5
    base, expert = (model_identity(member.path) for member in members)
    bias = torch.tensor([NormalDist().inv_cdf(MADE_UP_RATE)])
    GateArtifact(theta=theta, bias=bias, experts=("expert",), base=base, expert_identities=(expert,)).save(folder)
    return folder


def _demo(workdir: Path, dtype: str) -> Pair:
    """The shipped base and its expert ``codes``: all other pairs have one expert too."""
    from tokenizers import Tokenizer

    from engine.gate import GateArtifact

    folder = REPOSITORY / "models" / "demo"
    dtype = dtype or "float32"
    members = []
    for name in ("base", "codes"):
        config = json.loads((folder / name / "config.json").read_text())
        kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
        kv = 2 * config["num_hidden_layers"] * kv_heads * head_dim * DTYPE_BYTES[dtype]
        members.append(Member(folder / name, (folder / name / "model.safetensors").stat().st_size, kv))
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    questions = json.loads((folder / "questions.json").read_text())
    questions = [question for question in questions if question["kind"] != "arithmetic"]
    prompts = tuple(tuple(tokenizer.encode(question["prompt"]).ids) for question in questions)
    gate = workdir / "demo-gate-of-codes"
    GateArtifact.load(folder / "gate").only("codes").save(gate)
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    return Pair(
        DEMO,
        members[0],
        members[1],
        "codes",
        gate,
        dtype,
        vocab_size,
        max_tokens=64,
        max_model_len=1024,
        prompts=prompts,
        answers=tuple(question["completion"] for question in questions),
    )


# -- synthetic models -------------------------------------------------------------------------------------------


def save_tokenizer(directory: Path, vocab_size: int) -> list[int]:
    """Write a byte-level tokenizer: EOS, the 256 bytes, and ASCII fillers up to ``vocab_size`` (at least 300).

    Returns the ids whose text is printable ASCII.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", *alphabet, *(f"w{number}" for number in range(vocab_size - 1 - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return [number for number, word in enumerate(words) if number != EOS and all("!" <= c <= "~" for c in word)]


def _printable(vocab_size: int) -> list[int]:
    with tempfile.TemporaryDirectory() as directory:
        return save_tokenizer(Path(directory), vocab_size)


def _successors(vocab_size: int, member: int, agreement: float) -> list[int]:
    """What a member writes after each token, [vocab_size]: printable tokens only, each once, in long cycles."""
    import torch

    printable = _printable(vocab_size)
    count = len(printable)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(count, generator=generator).tolist()
    # One big cycle. Where the expert differs, it goes through the tokens that differ in another order.
    following = {printable[order[i]]: printable[order[(i + 1) % count]] for i in range(count)}
    if member:
        draws = torch.rand(count, generator=generator).tolist()
        differing = [token for token, draw in zip(printable, draws, strict=True) if draw >= agreement]
        targets = [following[token] for token in differing]
        following |= dict(zip(differing, targets[1:] + targets[:1], strict=True))
    return [following.get(token, printable[0]) for token in range(vocab_size)]


def _make(directory: Path, shape: ModelShape, vocab_size: int, dtype: str, context: int, successors: list[int]) -> None:
    """Write one checkpoint. config.json comes last: where it is, the checkpoint is whole."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory, vocab_size)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number, total, shard_bytes = 1, 0, 0
    for name, tensor in _tensors(shape, vocab_size, dtype, successors):
        if shard and shard_bytes + tensor.nbytes > _SHARD_BYTES:
            save_file(shard, directory / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            number, shard_bytes = number + 1, 0
            shard.clear()
        shard[name] = tensor
        weight_map[name] = f"model-{number:05d}.safetensors"
        shard_bytes += tensor.nbytes
        total += tensor.nbytes
    save_file(shard, directory / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "dtype": dtype,
    }
    unfinished = directory / "config.json.part"
    unfinished.write_text(json.dumps(config, indent=2))
    os.replace(unfinished, directory / "config.json")


def _tensors(
    shape: ModelShape, vocab_size: int, dtype: str, successors: list[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights in Hugging Face's layout, [rows out, columns in]."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    # One core draws nine billion numbers in minutes, a GPU in a second.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(shape.hidden)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        # Computed in float32 and rounded: the same on every machine of a kind.
        return (torch.randn(rows, columns, generator=generator, device=device) * std).to(kind).cpu()

    width, ffn = shape.hidden, shape.ffn
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    embedding = torch.randn(vocab_size, width, generator=generator, device=device)
    embedding = torch.nn.functional.normalize(embedding, dim=-1).cpu()
    head = torch.zeros(vocab_size, width)
    written = sorted(set(successors[1:]))
    predecessors = {successor: token for token, successor in enumerate(successors)}
    # Where several tokens have the same successor they share an embedding, so that the head's one row fits them all.
    last = torch.tensor([predecessors[successor] for successor in successors])
    embedding = embedding[last]
    head[written] = embedding[torch.tensor([predecessors[token] for token in written])]
    yield "model.embed_tokens.weight", embedding.to(kind)
    std = 0.02
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", torch.ones(width, dtype=kind)
        yield prefix + "self_attn.q_proj.weight", normal(queries, width, std)
        yield prefix + "self_attn.k_proj.weight", normal(keys, width, std)
        yield prefix + "self_attn.v_proj.weight", normal(keys, width, std)
        yield prefix + "self_attn.o_proj.weight", normal(width, queries, _PASS_THROUGH_STD)
        yield prefix + "post_attention_layernorm.weight", torch.ones(width, dtype=kind)
        yield prefix + "mlp.gate_proj.weight", normal(ffn, width, std)
        yield prefix + "mlp.up_proj.weight", normal(ffn, width, std)
        yield prefix + "mlp.down_proj.weight", normal(width, ffn, _PASS_THROUGH_STD)
    yield "model.norm.weight", torch.ones(width, dtype=kind)
    yield "lm_head.weight", head.to(kind)
    # Whoever is measured next wants the device's memory.
    torch.cuda.empty_cache()

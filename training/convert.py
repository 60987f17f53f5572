"""Base and gate to and from the reference format of arXiv 2403.03870.

There the LM head has V + 1 rows, the last one being theta, so config.json says V + 1 and the
embedding has a last row too (zeros here; no token has that id). The format holds one expert and no
bias.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.checkpoints import (
    CONFIG,
    GATE_IN_HEAD,
    WEIGHTS,
    copy_companions,
    make_readable,
    model_identity,
    read_json,
)
from engine.errors import CheckpointError, GateError
from engine.gate import GateArtifact

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"


def to_reference(base_dir: Path, gate_dir: Path, out_dir: Path) -> None:
    """Join a base and its gate into one checkpoint in the reference format.

    Theta takes the precision of the base's weights; a tied LM head is untied.

    Raises:
        GateError: the gate is not linear over the hidden state, has a bias or several experts, or another hidden size
            than the base.
    """
    gate = GateArtifact.load(gate_dir)
    if len(gate.experts) != 1:
        raise GateError(f"{gate_dir}: the reference format holds one expert, not {len(gate.experts)}")
    if gate.kind != "linear" or gate.features:
        raise GateError(
            f"{gate_dir}: the reference format holds a vector over the hidden state, not this gate's {gate.kind}"
        )
    if gate.bias.any():
        raise GateError(f"{gate_dir}: the reference format has no bias, and this gate's is not zero")
    config, tensors = _read(base_dir)
    embedding = tensors[EMBEDDING]
    head = tensors.get(HEAD, embedding)
    if head.shape[1] != gate.hidden_size:
        raise GateError(f"{gate_dir}: hidden size {gate.hidden_size}, the base's is {head.shape[1]}")
    tensors[EMBEDDING] = torch.cat([embedding, embedding.new_zeros(1, embedding.shape[1])])
    tensors[HEAD] = torch.cat([head, gate.theta.to(head.dtype)])
    _write(base_dir, out_dir, config, tensors, vocab_size=config["vocab_size"] + 1, gate_in_head=True)


def from_reference(reference_dir: Path, out_base_dir: Path, out_gate_dir: Path, expert: str = "expert") -> None:
    """Split a checkpoint in the reference format into a base and a gate for ``expert``.

    The format does not say which expert the gate is for, nor a threshold: the expert's identity is
    left open and the threshold is 0.5.

    Raises:
        GateError: no weights, or the head or the embedding does not have the config's rows.
    """
    config, tensors = _read(reference_dir)
    head, embedding = tensors.get(HEAD), tensors[EMBEDDING]
    rows = config["vocab_size"]
    if head is None:
        raise GateError(f"{reference_dir / WEIGHTS}: no {HEAD}: not in the reference format")
    for name, tensor in ((HEAD, head), (EMBEDDING, embedding)):
        if tensor.shape[0] != rows:
            found = tensor.shape[0]
            raise GateError(f"{reference_dir / WEIGHTS}: {name} has {found} rows, config.json {rows}")
    tensors[HEAD], tensors[EMBEDDING] = head[:-1].contiguous(), embedding[:-1].contiguous()
    _write(reference_dir, out_base_dir, config, tensors, vocab_size=rows - 1, gate_in_head=False)
    GateArtifact(
        theta=head[-1:].float(),
        bias=torch.zeros(1),
        experts=(expert,),
        base=model_identity(out_base_dir),
        expert_identities=(None,),
        data="taken from a checkpoint in the reference format",
    ).save(out_gate_dir)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and all weights, of one file or of several with an index."""
    try:
        config = read_json(directory / CONFIG)
        files = {WEIGHTS}
        if (directory / INDEX).exists():
            files = set(read_json(directory / INDEX)["weight_map"].values())
        tensors: dict[str, torch.Tensor] = {}
        for name in sorted(files):
            tensors.update(load_file(str(directory / name)))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise GateError(f"{directory}: cannot be read as a checkpoint: {error}") from error
    for key in ("vocab_size", "hidden_size"):
        if key not in config:
            raise GateError(f"{directory / CONFIG}: field {key}: missing")
    if EMBEDDING not in tensors:
        raise GateError(f"{directory}: no {EMBEDDING} among the weights")
    return config, tensors


def _write(
    source: Path,
    out: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    vocab_size: int,
    gate_in_head: bool,
) -> None:
    """Write a checkpoint with an untied head; tokenizer and generation settings are copied."""
    out.mkdir(parents=True, exist_ok=True)
    copy_companions(source, out, without=("README.md",))
    config = config | {"vocab_size": vocab_size, "tie_word_embeddings": False, GATE_IN_HEAD: gate_in_head}
    if not gate_in_head:
        del config[GATE_IN_HEAD]
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, str(out / WEIGHTS), metadata={"format": "pt"})
    make_readable(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """``collm convert to-reference|from-reference ...``; the exit status."""
    parser = argparse.ArgumentParser(prog="collm convert", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("to-reference", help="base and gate to one checkpoint")
    for name in ("base", "gate", "out"):
        there.add_argument(name, type=Path)
    back = commands.add_parser("from-reference", help="one checkpoint to base and gate")
    for name in ("reference", "out_base", "out_gate"):
        back.add_argument(name, type=Path)
    back.add_argument("--expert", default="expert", help="the expert's name in the gate")
    options = parser.parse_args(arguments)
    try:
        if options.command == "to-reference":
            to_reference(options.base, options.gate, options.out)
        else:
            from_reference(options.reference, options.out_base, options.out_gate, options.expert)
    except (CheckpointError, GateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

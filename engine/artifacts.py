"""What the artifacts beside a base have in common: a JSON file of fields, and tensors of a kind of gate.

All errors are of the user's files, and name the file and the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.checkpoints import make_readable, read_json
from engine.errors import CheckpointError, GateError
from engine.gates import FEATURES, KINDS, GateKind


def write_files(
    fields_file: Path, fields: Mapping[str, Any], tensors_file: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write both, into one directory, which is made if needed."""
    directory = fields_file.parent
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(tensors_file))
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    fields_file.write_text(text + "\n", encoding="utf-8")
    make_readable(directory, like=fields_file.name)  # a server often runs as someone else


def read_files(fields_file: Path, tensors_file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fields and tensors, not looked at yet.

    Raises:
        GateError: naming the file that is missing or cannot be read.
    """
    try:
        fields = read_json(fields_file)
    except CheckpointError as error:
        raise GateError(str(error)) from error
    try:
        return fields, load_file(str(tensors_file))
    except FileNotFoundError as error:
        raise GateError(f"{tensors_file}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise GateError(f"{tensors_file}: cannot be read as safetensors: {error}") from error


def kind_of(
    fields_file: Path,
    kind: str,
    features: Sequence[str],
    tensors_file: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    hidden_size: int,
    values: int,
) -> GateKind:
    """The kind of gate that these tensors are of.

    Args:
        values: how many it computes.

    Raises:
        GateError: kind or features are unknown, or a tensor is missing or of another shape than they say.
    """
    if kind not in KINDS:
        raise wrong(fields_file, "kind", f"is {kind!r}; this program knows {', '.join(KINDS)}")
    for name in features:
        if name not in FEATURES or features.count(name) > 1:
            raise wrong(fields_file, "features", f"has {name!r} twice, or it is none of {', '.join(FEATURES)}")
    found = tensors.get("theta")
    width = found.shape[1] if found is not None and found.dim() == 2 else 0
    for name, shape in KINDS[kind].shapes(hidden_size + len(features), values, width).items():
        check_tensor(tensors_file, name, tensors.get(name), shape)
    return KINDS[kind]


_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`(?: - at `\$\.(?P<path>[^`]*)`)?")
_TYPE = re.compile(r"Expected `[^`]*`, got `(?P<found>[^`]*)` - at `\$\.(?P<path>[^`]*)`")


def refusal(file: Path, message: str) -> GateError:
    """msgspec's message about an artifact's file in this program's words."""
    if match := _MISSING.fullmatch(message):
        if match["path"] is None:
            return wrong(file, match["field"], "missing")
        return wrong(file, f"{match['path']}.{match['field']}", "missing or of the wrong type")
    if match := _TYPE.fullmatch(message):
        return wrong(file, match["path"], f"has the wrong type, {match['found']}")
    return GateError(f"{file}: {message}")


def wrong(file: Path, name: str, what: str) -> GateError:
    """What is wrong with a field of an artifact's file."""
    return GateError(f"{file}: field {name}: {what}")


def check_tensor(file: Path, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Check that an artifact has a tensor, float32 and finite, of this shape.

    Raises:
        GateError: naming the file and the tensor.
    """
    if tensor is None:
        raise GateError(f"{file}: field {name}: missing")
    if tensor.shape != shape:
        found = list(tensor.shape)
        raise GateError(f"{file}: field {name}: has shape {found}, not {list(shape)}")
    if tensor.dtype != torch.float32:
        raise GateError(f"{file}: field {name}: is {tensor.dtype}, not torch.float32")
    if not torch.isfinite(tensor).all():
        raise GateError(f"{file}: field {name}: has values that are not finite")

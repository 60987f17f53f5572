"""A composed checkpoint: a folder that names its members and holds the connections between them.

    config.json                 the anchor's, with ``architectures`` and the key ``collm_composition``: what is computed
    composition.json            where the members are, what they must be, and how the connections were trained
    composition.safetensors     the connections' weights, float32: ``connections.N.query.weight`` and so on
    tokenizer.json and others   the anchor's

Paths of members are relative to the folder, or absolute. Shapes: D the anchor's hidden size, A an augmenting model's,
H query heads, G key and value heads, S the size of a head.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.checkpoints import (
    ModelIdentity,
    copy_companions,
    make_readable,
    model_identity,
    read_json,
    read_vocabulary,
    tokenizer_folder,
)
from engine.errors import CheckpointError, CompositionError

ARCHITECTURE = "CollmComposedForCausalLM"
"""The name in ``architectures`` of config.json."""
CONFIG_KEY = "collm_composition"
CONFIG_FILE = "config.json"
FIELDS_FILE = "composition.json"
TENSORS_FILE = "composition.safetensors"
FORMAT_VERSION = 1
EPSILON = 1e-6
"""Of the normalisation before a connection, where there is one."""

_PARTS = ("query", "key", "value", "output")
_NAMED_ENTRIES = 5


@dataclass(frozen=True)
class Connection:
    """One cross-attention.

    Attributes:
        augmenting: name of the augmenting model that is read.
        layer: its states after this layer are read, counted from 1.
        into: what is read is added to the anchor's states after this layer, counted from 1.
    """

    augmenting: str
    layer: int
    into: int


@dataclass(frozen=True)
class Heads:
    """The form of the connections' attention: H, G, S, and whether both models' states are normalised before it."""

    heads: int
    kv_heads: int
    head_size: int
    normalize: bool = False


@dataclass(frozen=True)
class Member:
    """A model that a composition is made of. ``identity``: what it was when the connections were trained."""

    name: str
    path: Path
    identity: ModelIdentity

    @property
    def hidden_size(self) -> int:
        """Of its states."""
        return int(self.identity.architecture["hidden_size"])

    @property
    def layers(self) -> int:
        """How many decoder layers it has."""
        return int(self.identity.architecture["num_hidden_layers"])


@dataclass(frozen=True)
class Composition:
    """What a composed checkpoint says of itself.

    Attributes:
        augmenting: in the order of their names in the configuration; at least one.
        connections: in the order of the tensors.
        training: the settings that the connections were trained with, or None.
        data: what they were trained on, in words.
        date: ISO 8601 day.
    """

    anchor: Member
    augmenting: tuple[Member, ...]
    connections: tuple[Connection, ...]
    heads: Heads
    training: dict[str, Any] | None = None
    data: str = ""
    date: str = ""

    def member(self, name: str) -> Member:
        """The augmenting model of that name."""
        return next(member for member in self.augmenting if member.name == name)

    def layers_of(self, name: str) -> int:
        """How many layers of an augmenting model are computed: those above the last one that is read are not."""
        return max(connection.layer for connection in self.connections if connection.augmenting == name)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name and shape of every tensor; rows are outputs."""
        form, anchor = self.heads, self.anchor.hidden_size
        found: dict[str, tuple[int, int]] = {}
        for number, connection in enumerate(self.connections):
            augmenting = self.member(connection.augmenting).hidden_size
            query, read = form.heads * form.head_size, form.kv_heads * form.head_size
            shapes = ((query, anchor), (read, augmenting), (read, augmenting), (anchor, query))
            found |= {f"connections.{number}.{part}.weight": shape for part, shape in zip(_PARTS, shapes, strict=True)}
        return found

    def check(self) -> None:
        """Check that the members on disk are those that the connections were trained for, and fit each other.

        Raises:
            CompositionError: naming the member, and how it differs.
        """
        for role, member in [("anchor", self.anchor), *((f"augmenting model {m.name}", m) for m in self.augmenting)]:
            if not member.path.is_dir():
                raise CompositionError(
                    f"the {role} is not in {member.path}, where {FIELDS_FILE} says that it is: put it there, or "
                    "correct its path"
                )
            differences = member.identity.differences(_identity_of(role, member.path))
            if differences:
                raise CompositionError(
                    f"the {role} in {member.path} is not the one that the composition was made for: "
                    + "; ".join(differences)
                )
        check_members(self.anchor, self.augmenting)

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the checkpoint, with the anchor's tokenizer and generation settings.

        Args:
            tensors: as :meth:`shapes` names them, float32.

        Raises:
            CompositionError: what :meth:`load` or :meth:`check` would refuse; nothing is written then.
        """
        self.check_fields(folder)
        self.check()
        _check_tensors(folder / TENSORS_FILE, {name: tuple(t.shape) for name, t in tensors.items()}, self.shapes())
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise CompositionError(f"{folder / TENSORS_FILE}: field {name}: is not float32 and finite")
        folder.mkdir(parents=True, exist_ok=True)
        copy_companions(self.anchor.path, folder)
        config = _read_json(self.anchor.path / CONFIG_FILE)
        config |= {
            "architectures": [ARCHITECTURE],
            CONFIG_KEY: {
                "augmenting": {member.name: member.identity.config_sha256 for member in self.augmenting},
                "connections": [asdict(connection) for connection in self.connections],
                **asdict(self.heads),
            },
        }
        _write_json(folder / CONFIG_FILE, config)
        fields = {
            "format_version": FORMAT_VERSION,
            "anchor": _member_fields(self.anchor, folder),
            "augmenting": [{"name": m.name, **_member_fields(m, folder)} for m in self.augmenting],
            "training": self.training,
            "data": self.data,
            "date": self.date,
        }
        _write_json(folder / FIELDS_FILE, fields)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / TENSORS_FILE))
        make_readable(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Composition:
        """Read what is in a folder; the members themselves are not looked at (see :meth:`check`).

        Raises:
            CompositionError: naming the file and the field that is missing or wrong.
        """
        directory = Path(folder)
        fields = _Reader(directory / FIELDS_FILE, _read_json(directory / FIELDS_FILE))
        config = _Reader(directory / CONFIG_FILE, _read_json(directory / CONFIG_FILE))
        version = fields.get("format_version", int)
        if version != FORMAT_VERSION:
            raise fields.wrong("format_version", f"is {version}; this program reads {FORMAT_VERSION}")
        computed = config.inner(CONFIG_KEY)
        found = cls(
            anchor=_member("anchor", fields.inner("anchor"), directory),
            augmenting=tuple(
                _member(inner.get("name", str), inner, directory) for inner in fields.list_of("augmenting")
            ),
            connections=tuple(
                Connection(inner.get("augmenting", str), inner.get("layer", int), inner.get("into", int))
                for inner in computed.list_of("connections")
            ),
            heads=Heads(
                computed.get("heads", int),
                computed.get("kv_heads", int),
                computed.get("head_size", int),
                computed.get("normalize", bool),
            ),
            training=fields.get("training", (dict, type(None))),
            data=fields.get("data", str),
            date=fields.get("date", str),
        )
        found.check_fields(directory)
        file = directory / TENSORS_FILE
        try:
            with safe_open(str(file), framework="pt") as tensors:
                shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise CompositionError(f"{file}: no such file") from error
        except (OSError, SafetensorError) as error:
            raise CompositionError(f"{file}: cannot be read as safetensors: {error}") from error
        _check_tensors(file, shapes, found.shapes())
        return found

    def check_fields(self, folder: Path) -> None:
        """Check what must hold among the fields themselves; ``folder`` is for the messages.

        Raises:
            CompositionError: naming the file and the field.
        """
        for field, problem in self.problems():
            file, name = (
                (FIELDS_FILE, field) if field.startswith("augmenting") else (CONFIG_FILE, f"{CONFIG_KEY}.{field}")
            )
            raise CompositionError(f"{folder / file}: field {name}: {problem}")

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not hold among the fields, and the field that it is about."""
        names = [member.name for member in self.augmenting]
        for name in names:
            # A module's name in the model: no dots, and no number, which vLLM would take for a layer's.
            if not name.isidentifier() or names.count(name) > 1:
                yield "augmenting.name", f"{name!r} is no identifier, or is there twice"
        form = self.heads
        if min(form.heads, form.kv_heads, form.head_size) < 1 or form.heads % form.kv_heads:
            yield "kv_heads", f"{form.kv_heads} does not divide heads, {form.heads}"
        for connection in self.connections:
            if connection.augmenting not in names:
                yield "connections", f"there is no augmenting model {connection.augmenting!r}"
                continue
            layers = self.member(connection.augmenting).layers
            if not 1 <= connection.layer <= layers:
                yield "connections.layer", f"{connection.layer} is not in 1..{layers}"
            if not 1 <= connection.into <= self.anchor.layers:
                yield "connections.into", f"{connection.into} is not in 1..{self.anchor.layers}"
        for name in names:
            if all(connection.augmenting != name for connection in self.connections):
                yield "connections", f"none reads the augmenting model {name!r}"
        if not names:
            yield "augmenting", "names no model"


def is_composed(folder: str | Path) -> bool:
    """Whether a folder holds a composed checkpoint."""
    try:
        return CONFIG_KEY in json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def make_member(name: str, path: str | Path) -> Member:
    """A checkpoint on disk as a member.

    Raises:
        CompositionError: it cannot be read, or no composition can be made with it; names it.
    """
    directory = Path(path)
    if is_composed(directory):
        raise CompositionError(f"{name}: {directory} is itself a composed checkpoint")
    identity = _identity_of(name, directory)
    architecture = identity.architecture
    for key in ("hidden_size", "num_hidden_layers"):
        if not isinstance(architecture.get(key), int):
            raise CompositionError(f"{name}: {directory / CONFIG_FILE} has no {key}: only text models can be composed")
    if _has_sliding_window(architecture):
        raise CompositionError(
            f"{name}: {directory / CONFIG_FILE} has layers with a sliding window, which cannot be composed"
        )
    return Member(name, directory, identity)


def _has_sliding_window(architecture: Mapping[str, Any]) -> bool:
    if "sliding_attention" in (architecture.get("layer_types") or ()):
        return True
    return (
        bool(architecture.get("sliding_window"))
        and architecture.get("use_sliding_window", True) is not False
        and "full_attention" not in (architecture.get("layer_types") or ())
    )


def check_members(anchor: Member, augmenting: Sequence[Member]) -> None:
    """Check that all members share a vocabulary: they read the same token ids.

    Raises:
        CompositionError: naming the member and the first entries that differ.
    """
    for member in augmenting:
        rows = member.identity.architecture.get("vocab_size")
        if isinstance(rows, int) and rows < _rows_needed(anchor):
            raise CompositionError(
                f"{member.name}: {member.path} embeds {rows} tokens, but the anchor reads ids up to "
                f"{_rows_needed(anchor) - 1}: resize its embedding"
            )
        if member.identity.tokenizer_sha256 == anchor.identity.tokenizer_sha256:
            continue
        ours, theirs = _vocabulary(anchor.path), _vocabulary(member.path)
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        named = ", ".join(
            f"{token!r} is {ours.get(token, 'absent')} in the anchor and {theirs.get(token, 'absent')} in {member.name}"
            for token in differing[:_NAMED_ENTRIES]
        )
        raise CompositionError(
            f"{member.name}: {member.path} does not share the anchor's vocabulary, so the two cannot be composed: "
            f"{len(differing)} entries differ, such as {named}"
        )


def _vocabulary(path: Path) -> dict[str, int]:
    return dict(read_vocabulary(tokenizer_folder(path)).ids)


def _rows_needed(anchor: Member) -> int:
    return max(_vocabulary(anchor.path).values(), default=-1) + 1


def _identity_of(role: str, path: Path) -> ModelIdentity:
    try:
        return model_identity(path)
    except CheckpointError as error:
        raise CompositionError(f"{role}: {error}") from error


def _member_fields(member: Member, folder: Path) -> dict[str, Any]:
    return {"path": os.path.relpath(member.path, folder), "identity": msgspec.to_builtins(member.identity)}


def _member(name: str, fields: _Reader, folder: Path) -> Member:
    identity = fields.inner("identity")
    architecture = identity.inner("architecture")
    for key in ("hidden_size", "num_hidden_layers"):
        architecture.get(key, int)
    return Member(
        name,
        # Joined to an absolute path, that path.
        Path(os.path.normpath(folder / fields.get("path", str))),
        ModelIdentity(
            config_sha256=identity.get("config_sha256", str),
            tokenizer_sha256=identity.get("tokenizer_sha256", str),
            architecture=dict(architecture.content),
            tokens=identity.get("tokens", int),
            text_sha256=identity.get("text_sha256", (str, type(None))),
        ),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads typed fields of a JSON object; its errors name the file and the field."""

    file: Path
    content: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.content:
            raise self.wrong(key, "missing")
        value = self.content[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key, f"has the wrong type, {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.wrong(key, f"is {value}")
        return value

    def inner(self, key: str) -> _Reader:
        return _Reader(self.file, self.get(key, dict), f"{self.prefix}{key}.")

    def list_of(self, key: str) -> list[_Reader]:
        values = self.get(key, list)
        for number, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.wrong(f"{key}.{number}", "is no object")
        return [_Reader(self.file, value, f"{self.prefix}{key}.{number}.") for number, value in enumerate(values)]

    def wrong(self, key: str, what: str) -> CompositionError:
        return CompositionError(f"{self.file}: field {self.prefix}{key}: {what}")


def _check_tensors(file: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise CompositionError(f"{file}: field {name}: missing")
        if found[name] != shape:
            raise CompositionError(f"{file}: field {name}: has shape {list(found[name])}, not {list(shape)}")
    for name in found:
        if name not in wanted:
            raise CompositionError(f"{file}: field {name}: no connection has it")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except CheckpointError as error:
        raise CompositionError(str(error)) from error


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

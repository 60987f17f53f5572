"""The regret artifact: how much an expert's token is regretted once the base has read on behind it.

Two files beside the gate's, in the same directory. ``regret.safetensors`` holds the tensors of a kind of gate
(:mod:`engine.gates`) with one value, which reads the base's step where the base looks back, and ``numbers`` [N], the
weights of :data:`engine.hindsight.NUMBERS`. ``regret.json`` holds everything else, field by field as in ``RegretFile``.

Shapes: N numbers, d hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.artifacts import check_tensor, kind_of, read_files, refusal, write_files, wrong
from engine.checkpoints import ModelIdentity
from engine.gate import REGRET_TENSORS_FILE as TENSORS_FILE
from engine.gates import KINDS, GateFunction
from engine.hindsight import LONGEST_AHEAD, NUMBERS, Hindsight

FORMAT_VERSION = 1
FIELDS_FILE = "regret.json"
FILES = (FIELDS_FILE, TENSORS_FILE)


class RegretFile(msgspec.Struct, kw_only=True):
    """regret.json. See ``RegretArtifact``."""

    format_version: int
    kind: str
    features: list[str]
    hidden_size: int
    ahead: int
    default_threshold: float
    base: ModelIdentity
    training: dict[str, Any] | None
    data: str
    date: str


@dataclass(frozen=True, eq=False)
class RegretArtifact:
    """A trained regret.

    Attributes:
        theta: [1, *] float32, ``bias`` [1], ``layers`` the kind's other tensors: as of a gate with one expert.
        numbers: [N] float32, weights of :data:`engine.hindsight.NUMBERS`.
        ahead: how many tokens, the expert's first, the base has read when it looks back; 1 to 16.
        base: the base it was trained on.
        default_threshold: an expert's token is taken back where it is regretted more than this.
        training: the settings it was trained with, and what it was measured at.
        data: what it was trained on, in words.
        date: ISO 8601 day.
        kind: name in ``engine.gates.KINDS``.
        features: what it reads of the base's distribution where it looks back; names of ``engine.gates.FEATURES``.
    """

    theta: torch.Tensor
    bias: torch.Tensor
    numbers: torch.Tensor
    ahead: int
    base: ModelIdentity
    default_threshold: float
    training: dict[str, Any] | None = None
    data: str = ""
    date: str = ""
    kind: str = "linear"
    features: tuple[str, ...] = ()
    layers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def function(self) -> GateFunction:
        """The base's step's part, as a function of hidden states and logits: [B, 1]."""
        return GateFunction(KINDS[self.kind], self.features, self._reading)

    @property
    def hindsight(self) -> Hindsight:
        """The other part."""
        return Hindsight(self.ahead, tuple(self.numbers.tolist()), self.default_threshold)

    @property
    def hidden_size(self) -> int:
        """d, the base's hidden size."""
        return int(self._reading[KINDS[self.kind].first[0]].shape[-1]) - len(self.features)

    @property
    def _reading(self) -> dict[str, torch.Tensor]:
        return {**self.layers, "theta": self.theta, "bias": self.bias}

    def save(self, path: str | Path) -> None:
        """Write both files into directory ``path``, which is made if needed.

        Raises:
            GateError: shapes or values that ``load`` would refuse; nothing is written then.
        """
        directory = Path(path)
        fields = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "features": list(self.features),
            "hidden_size": self.hidden_size,
            "ahead": self.ahead,
            "default_threshold": self.default_threshold,
            "base": msgspec.structs.asdict(self.base),
            "training": self.training,
            "data": self.data,
            "date": self.date,
        }
        tensors = {**self._reading, "numbers": self.numbers}
        _parse(fields, tensors, directory)
        write_files(directory / FIELDS_FILE, fields, directory / TENSORS_FILE, tensors)

    @classmethod
    def load(cls, path: str | Path) -> RegretArtifact:
        """Read the artifact in directory ``path``.

        Raises:
            GateError: naming the file and the field that is missing or wrong.
        """
        directory = Path(path)
        fields, tensors = read_files(directory / FIELDS_FILE, directory / TENSORS_FILE)
        return _parse(fields, tensors, directory)

    @classmethod
    def beside(cls, path: str | Path) -> RegretArtifact | None:
        """The artifact in a gate's directory, if there is one.

        Raises:
            GateError: as :meth:`load`.
        """
        return cls.load(path) if (Path(path) / FIELDS_FILE).is_file() else None


def _parse(fields: dict[str, Any], tensors: dict[str, torch.Tensor], directory: Path) -> RegretArtifact:
    """The artifact with these contents of its files; ``directory`` is for the messages."""
    file = directory / FIELDS_FILE
    try:
        read = msgspec.convert(fields, RegretFile)
    except msgspec.ValidationError as error:
        raise refusal(file, str(error)) from error
    if read.format_version != FORMAT_VERSION:
        raise wrong(file, "format_version", f"is {read.format_version}; this program reads {FORMAT_VERSION}")
    if not 1 <= read.ahead <= LONGEST_AHEAD:
        raise wrong(file, "ahead", f"is {read.ahead}, not 1 to {LONGEST_AHEAD}")
    if not math.isfinite(read.default_threshold):
        raise wrong(file, "default_threshold", f"is {read.default_threshold}")
    tensors_file = directory / TENSORS_FILE
    kind = kind_of(file, read.kind, read.features, tensors_file, tensors, hidden_size=read.hidden_size, values=1)
    check_tensor(tensors_file, "numbers", tensors.get("numbers"), (len(NUMBERS),))
    return RegretArtifact(
        theta=tensors["theta"],
        bias=tensors["bias"],
        numbers=tensors["numbers"],
        ahead=read.ahead,
        base=read.base,
        default_threshold=read.default_threshold,
        training=read.training,
        data=read.data,
        date=read.date,
        kind=read.kind,
        features=tuple(read.features),
        layers={name: tensors[name] for name in kind.hidden},
    )

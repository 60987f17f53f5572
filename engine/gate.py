"""The gate artifact: what computes the experts' values from the base's step, and the models that it fits.

A directory with two files. ``gate.safetensors`` holds the tensors of the gate's kind (:mod:`engine.gates`), float32;
every kind has ``theta`` [K, *] and ``bias`` [K]. ``gate.json`` holds everything else, field by field as in
``GateFile``. Format 1 knows linear gates over the hidden state alone, and these are still written as format 1.

Shapes: B rows, K experts, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.artifacts import kind_of, read_files, refusal, write_files, wrong
from engine.checkpoints import Checkpoint, ModelIdentity, locate
from engine.errors import CheckpointError, GateError
from engine.gates import KINDS, GateFunction

FORMAT_VERSIONS = (1, 2)
TENSORS_FILE = "gate.safetensors"
FIELDS_FILE = "gate.json"
REGRET_TENSORS_FILE = "regret.safetensors"
"""Of the regret artifact beside it, see :mod:`engine.regret`."""


def gate_logits(hidden_BD: torch.Tensor, theta_KD: torch.Tensor, bias_K: torch.Tensor) -> torch.Tensor:
    """Gate logits [B, K] in float32; K = 1 defers with probability sigmoid(logit)."""
    return hidden_BD.float() @ theta_KD.float().T + bias_K.float()


def gate_folder(name: str) -> Path:
    """The folder of an artifact; one that is named OWNER/NAME or OWNER/NAME@REVISION on a hub is fetched.

    Raises:
        GateError: it is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    found, _, revision = name.partition("@")
    try:
        return locate(found, revision or None, also=[TENSORS_FILE, REGRET_TENSORS_FILE])
    except CheckpointError as error:
        raise GateError(f"gate.path: {error}") from error


class GateFile(msgspec.Struct, kw_only=True):
    """gate.json. See ``GateArtifact`` for most fields.

    Attributes:
        kind, features: format 2; a file of format 1 has neither.
    """

    format_version: int
    kind: str = "linear"
    features: list[str] = []
    experts: list[str]
    hidden_size: int
    default_policy: str
    default_threshold: float
    base: ModelIdentity
    expert_identities: list[ModelIdentity | None]
    calibration: list[dict[str, float]] | None
    training: dict[str, Any] | None
    data: str
    date: str
    reliability: list[dict[str, float]] | None = None


@dataclass(frozen=True, eq=False)
class GateArtifact:
    """A trained gate.

    Attributes:
        theta: [K, *] float32, finite; [K, d] for a linear gate without features.
        bias: [K] float32, finite; zeros where the gate has none.
        experts: K names, in the order of theta's rows.
        base: the base it was trained on.
        expert_identities: K; None for an expert that was not recorded, which then is not checked.
        default_policy: name of the policy, unless a request asks for another.
        default_threshold: a token is deferred where its probability is greater than this.
        calibration: points of the threshold sweep, or None.
        reliability: share of tokens that need an expert by deferral probability, in bins, or None; for people.
        training: the settings it was trained with.
        data: what it was trained on, in words.
        date: ISO 8601 day.
        kind: name in ``engine.gates.KINDS``.
        features: what it reads of the base's distribution beside the hidden state; names of ``engine.gates.FEATURES``.
        layers: the kind's other tensors by name.
    """

    theta: torch.Tensor
    bias: torch.Tensor
    experts: tuple[str, ...]
    base: ModelIdentity
    expert_identities: tuple[ModelIdentity | None, ...]
    default_policy: str = "threshold"
    default_threshold: float = 0.5
    calibration: list[dict[str, float]] | None = None
    training: dict[str, Any] | None = None
    data: str = ""
    date: str = ""
    kind: str = "linear"
    features: tuple[str, ...] = ()
    layers: dict[str, torch.Tensor] = field(default_factory=dict)
    reliability: list[dict[str, float]] | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {**self.layers, "theta": self.theta, "bias": self.bias}

    @property
    def function(self) -> GateFunction:
        """The gate as a function of hidden states and logits."""
        return GateFunction(KINDS[self.kind], self.features, self.tensors)

    @property
    def hidden_size(self) -> int:
        """d, the base's hidden size."""
        return int(self.tensors[KINDS[self.kind].first[0]].shape[-1]) - len(self.features)

    def measured(self, what: str) -> list[tuple[float, float]]:
        """The calibration's points (threshold, what was measured at it), of those that have it."""
        return [
            (point["threshold"], point[what]) for point in self.calibration or () if {"threshold", what} <= point.keys()
        ]

    def only(self, *names: str) -> GateArtifact:
        """The gate for some of its experts, in this order: what a request that names them gets of the whole gate.

        Calibration and reliability are left out, being the whole gate's.

        Raises:
            GateError: the gate has no such expert.
        """
        unknown = [name for name in names if name not in self.experts]
        if unknown or not names:
            raise GateError(
                f"the gate is for the experts {', '.join(self.experts)}, not {', '.join(unknown) or 'none'}"
            )
        rows = [self.experts.index(name) for name in names]
        return replace(
            self,
            theta=self.theta[rows],
            bias=self.bias[rows],
            experts=names,
            expert_identities=tuple(self.expert_identities[row] for row in rows),
            calibration=None,
            reliability=None,
        )

    def save(self, path: str | Path) -> None:
        """Write both files into directory ``path``, which is made if needed.

        Raises:
            GateError: shapes or values that ``load`` would refuse; nothing is written then.
        """
        directory = Path(path)
        fields = {
            "format_version": 1,
            "experts": list(self.experts),
            "hidden_size": self.hidden_size,
            "default_policy": self.default_policy,
            "default_threshold": self.default_threshold,
            "base": msgspec.structs.asdict(self.base),
            "expert_identities": [i and msgspec.structs.asdict(i) for i in self.expert_identities],
            "calibration": self.calibration,
            "training": self.training,
            "data": self.data,
            "date": self.date,
        }
        if self.reliability is not None:
            fields["reliability"] = self.reliability
        if self.kind != "linear" or self.features:
            fields |= {"format_version": 2, "kind": self.kind, "features": list(self.features)}
        tensors = self.tensors
        _parse(fields, tensors, directory)
        write_files(directory / FIELDS_FILE, fields, directory / TENSORS_FILE, tensors)

    @classmethod
    def load(cls, path: str | Path) -> GateArtifact:
        """Read the artifact in directory ``path``.

        Raises:
            GateError: naming the file and the field that is missing or wrong.
        """
        directory = Path(path)
        fields, tensors = read_files(directory / FIELDS_FILE, directory / TENSORS_FILE)
        return _parse(fields, tensors, directory)

    def check_fits(self, base: str | Path | Checkpoint, experts: Sequence[str | Path | Checkpoint]) -> None:
        """Check that this gate was made for these checkpoints, the experts in its order.

        The base must be the same architecture with the same vocabulary; of an expert only the vocabulary counts.

        Raises:
            GateError: naming the model that differs, and how.
            CheckpointError: a checkpoint cannot be read.
        """
        if len(experts) != len(self.experts):
            names = ", ".join(self.experts)
            raise GateError(f"the gate is for {len(self.experts)} experts ({names}), {len(experts)} are given")
        wanted: list[tuple[str, ModelIdentity | None, str | Path | Checkpoint]] = [("base", self.base, base)]
        for name, identity, given in zip(self.experts, self.expert_identities, experts, strict=True):
            wanted.append((f"expert {name}", identity, given))
        for role, identity, given in wanted:
            if identity is None:
                continue
            checkpoint = given if isinstance(given, Checkpoint) else Checkpoint(given)
            differences = identity.differences(checkpoint.identity, vocabulary_only=role != "base")
            if differences:
                how = "; ".join(differences)
                raise GateError(
                    f"the {role} in {checkpoint.directory} is not the one that the gate was made for: {how}"
                )


def _parse(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], directory: Path) -> GateArtifact:
    """The artifact with these contents of its files; ``directory`` is for the messages."""
    file = directory / FIELDS_FILE
    version = fields.get("format_version", FORMAT_VERSIONS[0])
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise wrong(file, "format_version", f"is {version}; this program reads {known}")
    try:
        read = msgspec.convert(fields, GateFile)
    except msgspec.ValidationError as error:
        raise refusal(file, str(error)) from error
    experts = read.experts
    if not experts or not all(experts):
        raise wrong(file, "experts", "is not a list of names")
    if len(set(experts)) != len(experts):
        raise wrong(file, "experts", "has a name twice")
    if len(read.expert_identities) != len(experts):
        raise wrong(file, "expert_identities", f"has {len(read.expert_identities)} for {len(experts)} experts")
    if not math.isfinite(read.default_threshold):
        raise wrong(file, "default_threshold", f"is {read.default_threshold}")
    kind = kind_of(
        file,
        read.kind,
        read.features,
        directory / TENSORS_FILE,
        tensors,
        hidden_size=read.hidden_size,
        values=len(experts),
    )
    return GateArtifact(
        theta=tensors["theta"],
        bias=tensors["bias"],
        experts=tuple(experts),
        base=read.base,
        expert_identities=tuple(read.expert_identities),
        default_policy=read.default_policy,
        default_threshold=read.default_threshold,
        calibration=read.calibration,
        training=read.training,
        data=read.data,
        date=read.date,
        kind=read.kind,
        features=tuple(read.features),
        layers={name: tensors[name] for name in kind.hidden},
        reliability=read.reliability,
    )

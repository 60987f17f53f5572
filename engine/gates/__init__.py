"""Kinds of gates: how the values of the experts are computed from what the base's step leaves on the device.

One small file per kind, all with the interface ``GateKind``; :data:`KINDS` lists them. A gate's inputs are the base's
last hidden state and, if the artifact names any, features of the base's own distribution (:mod:`~.features`).
"""

from engine.gates.base import GateFunction, GateKind
from engine.gates.features import FEATURES, distribution_features
from engine.gates.linear import LINEAR
from engine.gates.mlp import MLP

KINDS: dict[str, GateKind] = {kind.name: kind for kind in (LINEAR, MLP)}

__all__ = ["FEATURES", "KINDS", "GateFunction", "GateKind", "distribution_features"]

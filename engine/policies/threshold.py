"""Defer where the gate's deferral probability is greater than the threshold. The method's default."""

from engine.policies.position import Policy, Position
from engine.types import BASE


def decide(position: Position) -> int:
    """The likeliest expert above the threshold, else the base."""
    assert position.deferral is not None
    return position.favourite if position.deferral > position.threshold else BASE


POLICY = Policy("threshold", needs="gate", decide=decide)

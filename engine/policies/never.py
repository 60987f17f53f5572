"""Defer nothing; the gate's values are still reported."""

from engine.policies.position import Policy, Position
from engine.types import BASE


def decide(_position: Position) -> int:
    """The base."""
    return BASE


POLICY = Policy("never", needs=None, decide=decide)

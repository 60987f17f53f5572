"""Defer each token with a fixed probability: the baseline that a learned gate has to beat at the same rate."""

from engine.policies.position import Policy, Position
from engine.types import BASE


def decide(position: Position) -> int:
    """The likeliest expert with probability ``rate``, else the base."""
    return position.favourite if position.draw < position.rate else BASE


POLICY = Policy("random", needs=None, decide=decide, draws=True)

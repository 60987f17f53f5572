"""Draw Z from the gate: the generative model of the method's paper, as written."""

from engine.policies.position import Policy, Position
from engine.types import BASE


def decide(position: Position) -> int:
    """Expert k with probability P(Z = k), else the base."""
    remaining = position.draw
    for lane, weight in position.weights:
        if remaining < weight:
            return lane
        remaining -= weight
    return BASE


POLICY = Policy("sample", needs="gate", decide=decide, draws=True)

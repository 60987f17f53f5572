"""Defer where the base is unsure: its top probability is below 1 - threshold. Needs no gate and no training.

The deferral probability that is reported is then 1 - (the base's top probability), before penalties and temperature.
"""

from engine.policies.position import Policy, Position
from engine.types import BASE


def decide(position: Position) -> int:
    """The likeliest expert where 1 - top probability is greater than the threshold, else the base."""
    assert position.deferral is not None
    return position.favourite if position.deferral > position.threshold else BASE


POLICY = Policy("confidence", needs="top_probability", decide=decide)

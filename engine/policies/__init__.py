"""Policies: each turns the gate's value at one position into who writes the next token.

One small file a policy, all with the same signature. A policy is pure: everything it may look at is in
:class:`~engine.policies.position.Position`, the random draw included.
"""

from engine.policies import always, confidence, never, random, sample, threshold
from engine.policies.position import NOT_FINITE, Policy, Position, read_gate
from engine.types import PolicyName

POLICIES: dict[PolicyName, Policy] = {
    "threshold": threshold.POLICY,
    "sample": sample.POLICY,
    "always": always.POLICY,
    "never": never.POLICY,
    "random": random.POLICY,
    "confidence": confidence.POLICY,
}

__all__ = ["NOT_FINITE", "POLICIES", "Policy", "Position", "read_gate"]

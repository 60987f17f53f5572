"""A step of UniTE over several vocabularies, and SAFE's reasons for not taking it.

UniTE (Yao et al., "Determine-Then-Ensemble", arXiv 2410.03777) averages the members on the union of their most probable
strings. Taken at every position of a long answer it ruins the answer; SAFE (arXiv 2510.15346) takes it only where every
member's tokens have a boundary (:meth:`~engine.spelling.strand.Strand.aligned`) and the members do not agree anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.spelling.mass import Mass
from engine.spelling.named import Score
from engine.spelling.speller import Speller, SpellingError

AGREED = 0.5
"""A token with a greater average probability is the most probable one whatever the rest is."""


class Rule(NamedTuple):
    """How a string is taken from the average; names and meanings are those of tokens' sampling, in that order.

    Attributes:
        temperature: 0 is the most probable string.
        top_k: 0 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def union(
    spellers: Sequence[Speller],
    masses: Sequence[Mass],
    weights: Sequence[float],
    *,
    top: int = 10,
    score: Score = "mass",
) -> dict[bytes, float]:
    """The members' average on the union of their ``top`` most probable strings.

    Args:
        spellers: per member.
        masses: per member, at the same offset of the text.
        weights: per member, not negative, sum 1.

    Returns:
        The strings by bytes, b"" for the end of the text, with their probabilities.
    """
    strings = sorted({string for mass in masses for string in mass.top(top)})
    joint = np.zeros(len(strings))
    for speller, mass, weight in zip(spellers, masses, weights, strict=True):
        row = np.array([_score(speller, mass, string, score) for string in strings])
        if row.any():
            joint += weight * row / row.sum()
    if not joint.any():
        raise ValueError("no member gives any string of the union a probability")
    return dict(zip(strings, map(float, joint / joint.sum()), strict=True))


def most_probable(joint: dict[bytes, float]) -> bytes:
    """The most probable string; of equal ones the first by bytes."""
    return min(joint, key=lambda string: (-joint[string], string))


def pick(joint: dict[bytes, float], rule: Rule, uniform: float) -> bytes:
    """A string of the average.

    Args:
        joint: with at least one that is possible; need not sum to 1.
        uniform: in [0, 1), for a rule that draws.
    """
    if rule.temperature == 0:
        return most_probable(joint)
    # By descending probability, as nucleus sampling has them; of equal ones the first by bytes.
    ranked = sorted((string for string in joint if joint[string]), key=lambda string: (-joint[string], string))
    logs = np.log([joint[string] for string in ranked]) / rule.temperature
    chances = np.exp(logs - logs[0])
    keep = int((chances >= rule.min_p).sum())
    if rule.top_k:
        keep = min(keep, rule.top_k)
    sums = np.cumsum(chances[:keep])
    # The first ones that have top_p together.
    keep = min(keep, int((sums < rule.top_p * sums[-1]).sum()) + 1)
    return ranked[min(int(sums[:keep].searchsorted(uniform * sums[keep - 1], side="right")), keep - 1)]


def scores_of(
    spellers: Sequence[Speller], masses: Sequence[Mass], string: bytes, *, score: Score = "mass"
) -> list[float]:
    """What each member gives to a string, by itself: not normalised on any union."""
    return [_score(speller, mass, string, score) for speller, mass in zip(spellers, masses, strict=True)]


def agreed(draft: bytes, masses: Sequence[Mass], weights: Sequence[float]) -> bool:
    """Whether the average would write the draft anyway, so that nothing need be averaged: all members find it most
    probable, or it has more than half of the probability.

    Args:
        draft: what the first member wrote, b"" for the end of the text.
    """
    if all(mass.best() == draft for mass in masses):
        return True
    chances = (mass.at(draft) if draft else mass.end for mass in masses)
    return sum(weight * chance for weight, chance in zip(weights, chances, strict=True)) > AGREED


def _score(speller: Speller, mass: Mass, string: bytes, score: Score) -> float:
    if not string:
        return mass.end
    if speller.vocabulary.exact(string):
        return mass.at(string)
    if score == "mass" and (chance := mass.of(string)):
        return chance
    try:
        tokens, _ = speller.spell_begun(string)
    except SpellingError:
        return 0.0
    return mass.at(speller.vocabulary.bytes_of(tokens[0]) or b"") if tokens else 0.0

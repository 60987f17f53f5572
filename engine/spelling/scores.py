"""What a model says of a text that is cut into another vocabulary's tokens: what a gate is trained on.

Let t_1..t_m be the model's own tokens for the text x, and a_q the offset after q of them. The probability that its
text begins with x[:i] is at least

    M(i) = P(t_1..t_q) * sum of D(t | t_1..t_q) over the tokens t that begin with x[a_q:i],    a_q <= i < a_q+1

so a foreign token over the bytes [i, j) has the probability M(j) / M(i), which is 1 at most. One forward pass gives it
for all. Left out are coverings of the text by other tokens than the canonical ones (Phan et al., arXiv 2410.09303, and
Vieira et al., arXiv 2412.03719, sum over them all): what a trained model gives to these is little.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from engine.spelling.mass import Mass
from engine.spelling.speller import Speller
from engine.spelling.strand import Strand


@dataclass(frozen=True, slots=True)
class ForeignScores:
    """One model's scores of N foreign tokens.

    Attributes:
        logp: [N] float32, log-probability of each; -inf where the model rules it out.
        right: [N] bool, whether the model is aligned there and its most probable token, or the end, is how the text
            goes on.
        aligned: [N] bool, whether it may be asked there at all: one of its tokens ends where the foreign one begins.
    """

    logp: NDArray[np.float32]
    right: NDArray[np.bool_]
    aligned: NDArray[np.bool_]


def score_foreign(
    speller: Speller, text: bytes, foreign: Sequence[bytes], ends: bool, mass_after: Callable[[int], Mass]
) -> ForeignScores:
    """Score a text token by foreign token.

    Args:
        speller: of the model's vocabulary. The model has read ``speller.spell(text)`` after its prompt.
        text: what was written.
        foreign: the text in foreign tokens.
        ends: whether one more foreign token ends the text.
        mass_after: the model's distribution after so many of its own tokens, 0 to m.
    """
    assert b"".join(foreign) == text, "the foreign tokens are another text"
    tokens = speller.spell(text)
    vocabulary = speller.vocabulary
    offsets = [0, *accumulate(len(vocabulary.bytes_of(token) or b"") for token in tokens)]
    # Each is looked at in order, twice: kept, those of a long text and a large vocabulary would take gigabytes.
    mass_at = lru_cache(maxsize=2)(mass_after)
    chances = (mass_at(place).at(text[a:b]) for place, (a, b) in enumerate(pairwise(offsets)))
    logs = [0.0, *accumulate(map(_log, chances))]

    def log_mass(offset: int) -> float:
        place = bisect_right(offsets, offset) - 1
        part = text[offsets[place] : offset]
        return logs[place] + (_log(mass_at(place).of(part)) if part else 0.0)

    own_ends = set(offsets)
    strand = Strand(speller)
    logp, right, aligned = [], [], []
    begin = 0
    for piece in foreign:
        before, after = log_mass(begin), log_mass(begin + len(piece))
        logp.append(after - before if before > -math.inf else -math.inf)
        aligned.append(strand.aligned(piece))
        mass = mass_at(bisect_right(offsets, begin) - 1)
        right.append(aligned[-1] and begin in own_ends and bool(best := mass.best()) and text.startswith(best, begin))
        strand.follow(piece)
        begin += len(piece)
    if ends:
        logp.append(_log(mass_at(len(tokens)).end))
        aligned.append(True)
        right.append(mass_at(len(tokens)).best() == b"")
    return ForeignScores(np.array(logp, np.float32), np.array(right, bool), np.array(aligned, bool))


def _log(chance: float) -> float:
    return math.log(chance) if chance > 0 else -math.inf

"""The window: what the base writes past a deferral before the expert has spoken, and who may have one."""

from __future__ import annotations

import msgspec

from engine.strategies.base import End
from engine.types import GenerationRequest, RunAhead, TokenLogprobs

LONGEST_WINDOW = 16
"""Most drafts of a request whose window length is chosen automatically; bounds what a rejection can waste."""


class Draft(msgspec.Struct, gc=False):
    """The base's own token at a position that is not written yet, and who is to write there.

    Attributes:
        writer: the base where the token stands as soon as all before it are written; else the expert that has the
            word.
        deferral: the deferral probability at this position, as the policy saw it.
        fault: why the request ends here, if the text comes this far.
        confidence: the base's top probability; None if it was not read.
        regret: what the base says of experts' tokens before; None if it was not read.
    """

    token: int
    writer: int
    deferral: float | None = None
    logprobs: TokenLogprobs | None = None
    fault: End | None = None
    confidence: float | None = None
    regret: float | None = None


def window_limit(request: GenerationRequest, default: RunAhead) -> int | None:
    """Most tokens that the base may draft past a deferral; None is as many as pay.

    Args:
        default: for requests that do not say.
    """
    wish = request.collaboration.run_ahead
    if wish is None:
        wish = default
    sampling = request.sampling
    # What depends on all tokens before a position is not evaluated inside a window.
    plain = (
        sampling.presence_penalty == sampling.frequency_penalty == sampling.min_p == 0
        and sampling.repetition_penalty == 1
        and not sampling.logit_bias
        and sampling.allowed_token_ids is None
        and not sampling.bad_words
        and sampling.structured_outputs is None
    )
    if wish == "off" or not plain:
        return 0
    return None if wish == "auto" else wish

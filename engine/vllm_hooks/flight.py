"""Steps that have been scheduled and whose samples are not known yet.

On a device that computes by itself the next step can be scheduled, and launched, before the samples of the last one are
read. A row that was sampled there is computed one token further all the same, with its sample as the last input, which
never leaves the device: it *looks ahead*. That is a guess that the sample will be written. It proves right when the
row is extended by its own sample, before or while the step is under way; then the step's sample is the answer to that
extension. Where it proves wrong, the row is cut as if it had been told a draft that did not stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from vllm.v1.request import Request

from engine.lanes.interface import LaneRequest


class Landed(NamedTuple):
    """A token that was sampled.

    Attributes:
        position: number of tokens that it follows, prompt included.
        row: where the runner's output has the request's readings and log-probabilities, or, if the position was
            asked for before the end, the sample's index among those.
    """

    request: Request
    position: int
    token: int
    row: int
    asked: bool


class FlyingRow(msgspec.Struct):
    """A row of a step that is under way.

    Attributes:
        request: vLLM's record; an id may be used again.
        tokens: computed in the step.
        position: number of tokens that the row's sample follows; -1 if there is none, since its chunk ends earlier.
        foreseen: the row is what the step computes. False while that is a guess.
        wanted: False once something else has become of the row.
    """

    request: Request
    tokens: int
    position: int
    foreseen: bool = True
    wanted: bool = True


@dataclass(slots=True)
class Flight:
    """A step that is under way.

    Attributes:
        rows: by request, in the step's order.
        asked: the asked positions that it passes, in the order of their samples.
        ends: the scheduler's records of rows that are sampled at their end, and that may look ahead.
    """

    rows: dict[str, FlyingRow] = field(default_factory=dict)
    asked: list[tuple[Request, int]] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)


def may_look_ahead(request: Request, added: LaneRequest) -> bool:
    """Whether a row's next position can be sampled by a worker that does not know the token before it.

    Whatever depends on the tokens that were written, or on what the scheduler does with them, cannot: penalties,
    grammars, forbidden words, blends.
    """
    params = request.sampling_params
    assert params is not None
    return (
        added.part is None
        and not added.scores
        and not request.use_structured_output
        and params.presence_penalty == params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and not params.bad_words_token_ids
        and params.prompt_logprobs is None
    )

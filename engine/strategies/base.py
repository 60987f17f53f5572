"""What the scheduler and a strategy say to each other.

A *strategy* is a way to write text with several lanes. For each request it makes a :class:`Decoding`, which is told
what the lanes have sampled and answers with *decisions*, as values: a :class:`~engine.types.Token` to be written, a
lane to be asked, a lane to be waited for, the end. The scheduler carries them out; it knows no method. All arrows run
down: strategies import no scheduler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

import msgspec

from engine.lanes.interface import Extension, LaneRequest, Sample
from engine.sequence import Sequence
from engine.types import Collaboration, ErrorCode, SamplingSpec, Token, TokenLogprobs

NEVER_TOLD = -1


class Ask(NamedTuple):
    """The lane is to be told what the decoding has for it (:meth:`Decoding.open`, :meth:`Decoding.extend`)."""

    lane: int


class Wait(NamedTuple):
    """Nothing more is written until this lane, which is asked too, has brought a sample that is awaited."""

    lane: int


class End(msgspec.Struct, frozen=True):
    """The request ends with an error. Its message is for whoever sent the request, its code for programs."""

    message: str
    code: ErrorCode


class Scored(NamedTuple):
    """The request's prompt is scored.

    Attributes:
        entries: one for each prompt token but the first.
    """

    entries: list[TokenLogprobs]


class Finish(NamedTuple):
    """The text is complete, though no token says so."""

    reason: Literal["stop", "length"]


LOST = End("the step of a lane timed out", ErrorCode.STEP_TIMEOUT)
"""Of a request that cannot go on without the lane."""

Decision = Token | Ask | Wait | End | Scored | Finish
"""A token is written, with the credit that it carries; if it ends the request, later decisions are not looked at."""


class Rejected(Exception):
    """A request cannot be served; the message says why, for whoever sent it.

    Args:
        field: the one at fault, as it is named in a request over HTTP.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INVALID_REQUEST, *, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class Counters(msgspec.Struct):
    """What strategies count; see :class:`~engine.stats.EngineStats`."""

    gate_errors: int = 0
    expert_failures: int = 0
    agreements: int = 0
    runahead_accepted: int = 0
    runahead_discarded: int = 0
    unaligned_deferrals: int = 0
    vetoed: int = 0
    regretted: int = 0
    revoked: int = 0


class Decoding(ABC):
    """One request in the hands of a strategy.

    Attributes:
        answer: what is written so far, and where it must end. Written to by the scheduler only.
        primary_lane: the lane that the request starts with. Its prompt log-probabilities are the request's.
        fixed_window: the request itself says how far ahead of its experts it runs.
    """

    __slots__ = ("answer", "fixed_window", "primary_lane")

    def __init__(self, answer: Sequence, primary_lane: int) -> None:
        self.answer = answer
        self.primary_lane = primary_lane
        self.fixed_window = False

    def on_admitted(self) -> Iterable[Decision]:
        """The request is in the lanes from now on. Its primary lane is asked anyway."""
        return ()

    @abstractmethod
    def awaits(self, lane: int, position: int) -> bool:
        """Whether a lane's sample at this position is of use. One that is not is stale, and is dropped."""

    @abstractmethod
    def open(self, lane: int) -> LaneRequest:
        """The request, for a lane that does not hold it: with the lane's own prompt, tokens and readings."""

    @abstractmethod
    def extend(self, lane: int) -> Extension | None:
        """What became of the row since it was last told; None if the lane is still busy with what it knows."""

    @abstractmethod
    def on_sample(self, lane: int, sample: Sample, fault: End | None) -> Iterable[Decision]:
        """A lane has brought an awaited sample.

        The scheduler takes decisions one at a time and stops at the end of the request, so that a generator's code
        behind a token runs only if the text goes on.

        Args:
            fault: the primary lane's sample cannot be used; the request must end here if the text comes this far.
        """

    @abstractmethod
    def on_lane_lost(self, lane: int) -> Iterable[Decision]:
        """The lane that is waited for does not come back from its step."""

    def needs(self, lane: int) -> bool:
        """Whether the request, where it waits for no lane in particular, cannot go on without this one."""
        return lane == self.primary_lane

    def in_force(self) -> Collaboration:
        """What the request asked for, with the defaults that apply filled in."""
        return self.answer.request.collaboration

    def on_end(self) -> None:
        """The request has ended, for whatever reason."""
        return

    def expected_gain(self) -> float:
        """How many tokens the base's next sample is expected to bring: 1, less where it may be in vain."""
        return 1.0


class SharedText(Decoding):
    """A decoding whose lanes all write the same tokens: one vocabulary, one list. Prompts may differ.

    There are no phases, only counters: ``known[lane]`` output tokens have been told to a lane and are still true, and
    the lane catches up.

    Attributes:
        known: per lane; NEVER_TOLD for one that does not hold the request.
        prompts: per lane.
        prompt_lengths: per lane.
    """

    __slots__ = ("known", "prompt_lengths", "prompts")

    def __init__(self, answer: Sequence, primary_lane: int, lanes: int) -> None:
        super().__init__(answer, primary_lane)
        self.known = [NEVER_TOLD] * lanes
        request = answer.request
        self.prompts = [request.prompt_of(lane) for lane in range(lanes)]
        self.prompt_lengths = [len(prompt) for prompt in self.prompts]

    def sampling(self, lane: int) -> SamplingSpec:
        """The sampling parameters that a lane is given."""
        sampling = self.answer.request.sampling
        if sampling.prompt_logprobs is not None and lane != self.primary_lane:
            # The prompt is scored once, by the model that the request starts with.
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return sampling

    def open(self, lane: int) -> LaneRequest:
        """All that is written, to a lane that holds nothing."""
        answer = self.answer
        request = answer.request
        self.known[lane] = len(answer.tokens)
        return LaneRequest(
            request.request_id,
            self.prompts[lane],
            list(answer.tokens),
            self.sampling(lane),
            final=len(answer.tokens),
            wants_top_probability=self.wants_top_probability(lane),
            draw_offset=answer.prompt_length - self.prompt_lengths[lane],
        )

    def wants_top_probability(self, lane: int) -> bool:
        """Whether a lane is to say how sure it is."""
        return self.answer.request.collaboration.looks

    def extend(self, lane: int) -> Extension | None:
        """What is written since."""
        tokens = self.answer.tokens
        known, written = self.known[lane], len(tokens)
        if known >= written:
            return None
        self.known[lane] = written
        return Extension(self.answer.request.request_id, known, tokens[known:], written)


class Strategy(Protocol):
    """A way to write text with several lanes. One object serves all requests of an engine.

    Attributes:
        counters: what it counts.
    """

    counters: Counters

    def begin(self, answer: Sequence) -> Decoding:
        """Take a request on, before it is queued.

        Raises:
            Rejected: it cannot be served like this.
        """
        ...


class Outlook(NamedTuple):
    """Inputs to the gather decision for one expert lane, between two steps.

    Attributes:
        parked: requests that wait for the lane.
        drafting: those of them for which the base still drafts on.
        fixed_window: those of them that asked for a number of drafts, which is not to be second-guessed.
        since: when the longest waiting one began to wait, in seconds of the scheduler's clock; None if none waits.
        progress: tokens that the base's next step is expected to gain; drafts count with the probability that they
            stand.
        alone: requests that start with this lane.
    """

    parked: int
    drafting: int
    fixed_window: int
    since: float | None
    progress: float
    alone: int


class StepPacer(Protocol):
    """Told of every step; says in lockstep when an expert's lane should wait for company."""

    def observe(self, lane: int, tokens: int, rows: int, seconds: float, gained: float = 0.0) -> None:
        """Take in one step of a lane; ``gained`` is what the base's step brought, as in :class:`Outlook`."""
        ...

    def launch(self, lane: int) -> None:
        """A step of a lane is launched that will be told of when it has ended; other lanes' may end before."""
        ...

    def should_wait(self, lane: int, outlook: Outlook) -> bool:
        """Whether an expert's lane should wait, given that the base has just stepped and can step again."""
        ...

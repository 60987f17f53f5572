"""What the scheduler asks of a lane, and what it gets back.

A lane holds requests, computes their tokens with whatever batching and memory management it likes, and samples one
token wherever it has caught up with all the tokens it was told. Then the row is *parked*: it keeps its place and
waits to be *extended* by the tokens that were decided. A lane never appends its own sample by itself. Tokens that it
was told may be drafts, which a later extension *cuts*.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from engine.blends import Blend
from engine.grammar.worker import Setup
from engine.stats import LaneStats
from engine.types import ErrorCode, GenerationRequest, LaneInfo, SamplingSpec, TokenLogprobs


class Part(NamedTuple):
    """A lane's part in a text that several lanes write by their distributions.

    Attributes:
        lane: its number.
        request_id: of the request; the lane may name its row otherwise.
        blend: without members that weigh nothing. The last one samples the combination at every position; the others
            lay their distributions on the engine's shelf. None: it lays its distribution down as one over byte strings
            (:class:`~engine.spelling.mass.Mass`), None in its place if it is no distribution.
    """

    lane: int
    request_id: str
    blend: Blend | None

    @property
    def writes(self) -> bool:
        """Whether the lane samples the combination."""
        return self.blend is not None and self.lane == self.blend.writer


class LaneRequest(NamedTuple):
    """A request that is new to a lane.

    Attributes:
        prompt: token ids, the lane's own.
        written: tokens already written, by whichever model; output, not prompt, so that penalties, min_tokens and
            stop rules mean the same in every lane. Those from ``final`` on are drafts.
        final: how many of them can no longer be cut.
        asked: positions at which to sample besides the end, in order, see :class:`Extension`.
        wants_top_probability: report the top probability beside each sample.
        draw_offset: added to a position where the draw at it is keyed, so that lanes with prompts of different lengths
            draw alike.
        scores: at asked positions nothing is drawn: the sample's token is the one that the lane was told stands there.
        part: None if the lane samples its own distribution and nobody else needs that.
        order: the request's number in the order of admission, the same in all lanes. Where memory does not suffice for
            all, those that were admitted first go on.
        primary: the request's text begins in this lane. In the others a row may be of no use for long, while the
            request goes on elsewhere, and may be given up for one that waits.
    """

    request_id: str
    prompt: list[int]
    written: list[int]
    sampling: SamplingSpec
    final: int
    asked: tuple[int, ...] = ()
    wants_top_probability: bool = False
    part: Part | None = None
    draw_offset: int = 0
    scores: bool = False
    order: int = 0
    primary: bool = False


class Extension(msgspec.Struct, frozen=True, gc=False):
    """What became of a row since the lane's last visit: it is cut, then grows by at least one token.

    Attributes:
        keep: how many of the output tokens that the lane was told stand; the others are forgotten.
        tokens: output tokens to be appended.
        final: how many output tokens, the appended ones included, can no longer be cut. Only these may be shared with
            other requests (a prefix cache).
        asked: positions (numbers of tokens, prompt included, that the sample follows) before the end at which the
            lane is to sample too, in order. Replaces what was asked before.
    """

    request_id: str
    keep: int
    tokens: list[int]
    final: int
    asked: tuple[int, ...] = ()


@dataclass(slots=True)
class LaneWork:
    """What changed for a lane since its last step. Removals are applied first; unknown ids in them are ignored."""

    remove: list[str] = field(default_factory=list)
    add: list[LaneRequest] = field(default_factory=list)
    extend: list[Extension] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.remove or self.add or self.extend)


class Sample(msgspec.Struct, gc=False):
    """One sampled token, not yet accepted by anybody.

    Attributes:
        position: number of tokens, prompt included, that it follows.
        gate: the gate's value for each expert, [K], at this position; None if the lane has no gate.
        top_probability: probability of the lane's most probable token, if the request wanted it.
        logprobs: if the request asked for them.
        prompt_logprobs: once a request, if it asked for them.
        support: where the lane writes a blend: the token's log-probability with each member, in lane order; NaN where
            their combination is no distribution.
        regret: what the base's step says of experts' tokens before, see :mod:`engine.hindsight`; None if the lane has
            no regret artifact.
    """

    request_id: str
    position: int
    token: int
    gate: list[float] | None = None
    top_probability: float | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    support: list[float] | None = None
    regret: float | None = None


class Refusal(NamedTuple):
    """Why a request cannot be served; one line."""

    message: str
    code: ErrorCode = ErrorCode.INVALID_REQUEST


class Failure(NamedTuple):
    """A request that a lane cannot go on with."""

    request_id: str
    message: str
    code: ErrorCode


class Computed(NamedTuple):
    """A request's part in a step.

    Attributes:
        lane: number of the lane that it was computed for; a guest's own.
        tokens: positions computed.
        prompt_tokens: how many of them are the prompt's.
        cached_tokens: prompt tokens that were found in the prefix cache; only where the lane first reads the prompt.
    """

    lane: int
    request_id: str
    tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class LaneReport:
    """What one step brought.

    Attributes:
        samples: one for each row that has caught up, and one for each asked position that was passed; those of a row
            in the order of their positions.
        seconds: the lane's own time: schedule, forward pass, sampling. Of a :class:`Launched` step what the caller's
            thread spent on it, waiting included.
        tokens: positions computed.
        rows: requests that took part.
        failures: requests that the lane cannot go on with; the others go on.
        guests: what the step brought to lanes whose rows it computed too, by lane number; their time is in ``seconds``,
            their tokens and rows in ``tokens`` and ``rows``.
        computed: what was computed for whom, guests' rows included.
        device_seconds: of ``seconds``, those in which the device computed (the forward pass and sampling); in the
            others it waited for the host.
    """

    samples: list[Sample]
    seconds: float
    tokens: int = 0
    rows: int = 0
    failures: list[Failure] = field(default_factory=list)
    guests: dict[int, list[Sample]] = field(default_factory=dict)
    computed: list[Computed] = field(default_factory=list)
    device_seconds: float = 0.0


class Launched(Future[LaneReport]):
    """A step that waits for its device, behind whatever else was launched there. Nobody completes it but ``finish``.

    Up to :attr:`Lane.depth` steps of a lane may be launched; they are finished in the order of their launches.

    Args:
        collect: waits for the device, then takes the step in.
    """

    def __init__(self, collect: Callable[[], LaneReport]) -> None:
        super().__init__()
        self._collect = collect

    def finish(self) -> None:
        """Wait for the device and complete the future; it fails if the step has failed."""
        try:
            self.set_result(self._collect())
        except Exception as error:
            self.set_exception(error)


class Lane(Protocol):
    """An engine that the scheduler drives. Calls come from one thread.

    ``apply`` is never called while a step is under way, unless the lane has room for another :class:`Launched` one.

    A lane may be another one's *guest*: it has rows of its own, and the other one, its host, computes them in its
    steps, along with its own. Nobody starts a guest; the host's reports have its samples.
    """

    @property
    def info(self) -> LaneInfo:
        """Name, checkpoint and sizes."""
        ...

    @property
    def depth(self) -> int:
        """How many of its steps may be launched and not finished yet; 0: its steps are never :class:`Launched`."""
        ...

    def refusal(self, request: GenerationRequest) -> Refusal | None:
        """Why this lane could not take a request, if it could not. Whatever passes here must not fail later."""
        ...

    def form_setup(self) -> Setup | None:
        """What is needed to read forms (structured output) for this lane; None if it does without."""
        ...

    def apply(self, work: LaneWork) -> None:
        """Take in what changed."""
        ...

    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        ...

    def is_preparing(self) -> bool:
        """Whether work will come by itself, without anything being applied (a grammar is being compiled)."""
        ...

    @property
    def starved(self) -> int | None:
        """The ``order`` of the first request that waits for memory which rows without anything to do hold, if one does.

        That is no work: those rows may go on soon, and to compute them again takes longer than to wait for that. Where
        it no longer does, the lane has work.
        """
        ...

    def make_room(self) -> None:
        """Let the next step take memory from such rows, those first that were admitted last. Called while the lane is
        starved and no lane has anything to do.
        """
        ...

    def start(self) -> Future[LaneReport]:
        """Begin one step. A lane that computes in the caller's thread returns a future that is already done; one whose
        device computes by itself returns a :class:`Launched`.

        The future fails if the step does; the lane cannot be used any more then.
        """
        ...

    def flush(self) -> None:
        """Called when the engine goes idle: hand removed requests' last state back."""
        ...

    def leftovers(self) -> list[str]:
        """What an idle lane still holds, one line each (a request, a KV block, an edit). Empty if all is well."""
        ...

    def stats(self) -> LaneStats:
        """Counters and gauges; list-valued fields are handed out once."""
        ...

    def shutdown(self) -> None:
        """Free everything; the lane cannot be used any more."""
        ...

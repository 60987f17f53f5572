"""The scheduler against brute force, whatever the lanes do: any order, any pace, any preemption, any abort.

The second half shows that the machine can fail: each sabotage of the scheduler or of a lane is found by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bench.standin import StandinLane
from engine.hindsight import Hindsight
from engine.lanes import LaneWork, Sample
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.strategies.base import Decision, SharedText
from engine.strategies.deferral.strategy import DeferralDecoding
from engine.types import BASE, Delta, GenerationRequest, Token, TokenLogprobs
from tests.engine.builders import POLICY_NAMES, RepeatingLane, make_lanes, make_scheduler
from tests.engine.drawn import Focus, requests
from tests.engine.oracle import Ledger, Pair, Written, check, look

MAX_REQUESTS = 12
MAX_EVENTS = 20_000
"""More than any run takes that comes to rest."""
LANE = st.integers(0, 2)
"""Taken modulo the number of lanes."""


def held(lane: StandinLane) -> list[str]:
    """Requests that have a row in a lane."""
    leftovers = lane.leftovers()
    return [leftover.removeprefix("request ") for leftover in leftovers if leftover.startswith("request ")]


class SchedulerMachine(RuleBasedStateMachine):
    scheduler_type = Scheduler
    lane_types: tuple[type[StandinLane], ...] = (StandinLane, RepeatingLane)
    focus: Focus = "all"

    @initialize(
        experts=st.sampled_from((1, 2, 2, 0)),
        # With two tokens every other draft is what the expert writes.
        vocab_size=st.sampled_from((2, 3, 16)),
        has_gate=st.sampled_from((True, True, True, True, False)),
        policy=st.sampled_from(POLICY_NAMES),
        threshold=st.floats(0.2, 0.8),
        max_num_seqs=st.integers(1, 6),
        token_budget=st.sampled_from((3, 8, 20, 500)),
        kv_tokens=st.sampled_from((40, 60, 100, None)),
        lane_kind=st.integers(0, 1),
        base_steps=st.sampled_from((1, 1, 4)),
        score_window=st.sampled_from((1, 2, 5, 100)),
        hindsight=st.none()
        | st.builds(Hindsight, st.integers(1, 6), st.tuples(*[st.floats(-0.2, 0.2)] * 4), st.just(1.0)),
    )
    def build(
        self,
        lane_kind: int,
        token_budget: int,
        kv_tokens: int | None,
        base_steps: int,
        score_window: int,
        **fields: Any,
    ) -> None:
        self.base_steps = base_steps
        self.pair = Pair(max_model_len=40, **fields)
        self.scheduler = make_scheduler(self.pair, self.scheduler_type, score_window=score_window)
        kind = self.lane_types[lane_kind]
        self.lanes = make_lanes(self.pair, kind, token_budget=token_budget, kv_tokens=kv_tokens)
        self.begin()

    def begin(self) -> None:
        """Nothing has happened yet."""
        self.under_way: dict[int, list[Sample]] = {}
        self.landed: list[tuple[int, Sample]] = []
        self.requests: dict[str, GenerationRequest] = {}
        self.aborted: set[str] = set()
        self.ledger = Ledger()
        self.events = 0

    # -- requests ---------------------------------------------------------------------------------------------

    def drawn_request(self, data: st.DataObject, request_id: str) -> GenerationRequest:
        return data.draw(requests(request_id, self.pair, focus=self.focus))

    @precondition(lambda self: len(self.requests) < MAX_REQUESTS)
    @rule(data=st.data(), count=st.integers(1, 3))
    def add(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            new = self.drawn_request(data, str(len(self.requests)))
            self.requests[new.request_id] = new
            self.scheduler.add(new)

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, MAX_REQUESTS))
    def abort(self, choice: int) -> None:
        """Any request: waiting, prefilling, parked, and now and then one that has finished."""
        live = [request_id for request_id in self.requests if not self.ledger.finished(request_id)]
        request_id = (live or list(self.requests))[choice % len(live or self.requests)]
        self.aborted.add(request_id)
        self.scheduler.abort(request_id)

    # -- lanes ------------------------------------------------------------------------------------------------

    @rule(lane=LANE)
    def start(self, lane: int) -> None:
        """A lane begins a step, unless one is under way; when it lands is another rule's business."""
        lane %= self.pair.lanes
        if lane in self.under_way:
            return
        driven = self.lanes[lane]
        driven.apply(self.scheduler.plan(lane))
        if driven.has_work():
            self.events += 1
            self.under_way[lane] = driven.start().result().samples

    @precondition(lambda self: self.under_way)
    @rule(lane=LANE)
    def land(self, lane: int) -> None:
        under_way = sorted(self.under_way)
        lane = under_way[lane % len(under_way)]
        samples = self.under_way.pop(lane)
        self.events += 1
        # A lane reports a prompt's logprobs once, so a repetition is without them.
        self.landed += [(lane, msgspec.structs.replace(sample, prompt_logprobs=None)) for sample in samples]
        self.scheduler.land(lane, samples)

    @rule(lanes=st.lists(LANE, min_size=1, max_size=8))
    def step(self, lanes: list[int]) -> None:
        """Some lanes step and land, one after the other."""
        for lane in lanes:
            self.start(lane)
            if self.under_way:
                self.land(lane)

    @rule(lane=LANE, choice=st.integers(0, 7))
    def preempt(self, lane: int, choice: int) -> None:
        """A lane drops the KV memory of any row it holds."""
        driven = self.lanes[lane % self.pair.lanes]
        rows = held(driven)
        if rows:
            driven.preempt(rows[choice % len(rows)])

    # -- samples that nobody waits for ------------------------------------------------------------------------

    def inject(self, lane: int, sample: Sample) -> None:
        self.collect()
        self.scheduler.land(lane, [sample])
        assert self.scheduler.take_deltas() == []

    @precondition(lambda self: self.landed)
    @rule(choice=st.integers(0, 1 << 16), newest=st.booleans())
    def land_again(self, choice: int, newest: bool) -> None:
        """Whatever a lane's sample brought about, its repetition brings nothing."""
        lane, sample = self.landed[-1 if newest else choice % len(self.landed)]
        if self.requests[sample.request_id].collaboration.regret not in (None, 1.0):
            return  # likewise behind a token that is taken back
        if not newest and self.requests[sample.request_id].collaboration.run_ahead not in (None, "off"):
            return  # what followed drafts that were cut may come true at the same position, and differ
        if self.requests[sample.request_id].scores:
            return  # what is drawn behind a window lies where the next one is scored
        self.inject(lane, sample)

    @precondition(lambda self: self.requests)
    @rule(choice=st.integers(0, MAX_REQUESTS), lane=LANE, offset=st.integers(-3, 3))
    def land_stray(self, choice: int, lane: int, offset: int) -> None:
        """A sample at a position that is not open, or from a lane that has no say at the open one."""
        self.collect()
        stray = list(self.requests.values())[choice % len(self.requests)]
        lane %= self.pair.lanes
        written = self.ledger.got.get(stray.request_id)
        tokens = written.tokens if written else []
        sources = written.sources if written else []
        if stray.scores and not self.ledger.finished(stray.request_id):
            return  # its positions are those of the prompt
        if offset == 0 and not self.ledger.finished(stray.request_id):
            expert_tokens = sum(source != BASE for source in sources)
            writer, _ = look(stray, self.pair, [*stray.prompt, *tokens], expert_tokens)
            if lane in (writer, stray.collaboration.member or BASE):
                return
        if offset >= 0 and stray.collaboration.regret not in (None, 1.0):
            return  # more is decided than is written
        if offset > 0 and stray.collaboration.run_ahead not in (None, "off"):
            return  # a draft, maybe
        entry = TokenLogprobs([1], [-1.0], 1)
        prompts = dict(stray.collaboration.prompts)
        position = len(prompts.get(lane, stray.prompt)) + len(tokens) + offset
        self.inject(lane, Sample(stray.request_id, position, 1, [1.0] * self.pair.experts, 0.5, entry))

    @rule(lane=LANE)
    def land_unknown(self, lane: int) -> None:
        self.inject(lane % self.pair.lanes, Sample("nobody", 1, 1))

    # -- results ----------------------------------------------------------------------------------------------

    @rule()
    def collect(self) -> None:
        self.ledger.take(self.scheduler.take_deltas())

    @precondition(lambda self: len(self.requests) > MAX_REQUESTS / 2)
    @rule()
    def settle(self) -> None:
        """Run until nothing is left: then all requests have what brute force writes, and all lanes are empty."""
        events = -1
        while self.events > events:
            events = self.events
            assert events < MAX_EVENTS
            self.step([BASE] * (self.base_steps - 1) + list(range(self.pair.lanes)))
        self.collect()
        assert self.scheduler.idle
        assert (self.scheduler.running, self.scheduler.waiting) == (0, 0)
        assert [lane.leftovers() for lane in self.lanes] == [[]] * self.pair.lanes
        assert self.ledger.got.keys() == self.requests.keys()
        for request_id, written in self.ledger.got.items():
            assert request_id in self.aborted or written.finish_reason != "aborted"
            self.check(written, self.requests[request_id])

    def check(self, written: Written, request: GenerationRequest) -> None:
        check(written, request, self.pair)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.settle()

    @invariant()
    def seats_are_kept(self) -> None:
        assert self.scheduler.running <= self.pair.max_num_seqs
        assert all(len(held(lane)) <= self.pair.max_num_seqs for lane in self.lanes)

    @invariant()
    def idle_is_idle(self) -> None:
        if self.scheduler.idle:
            assert all(self.ledger.finished(request_id) for request_id in self.requests)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


# -- sabotages ------------------------------------------------------------------------------------------------


class AcceptsOldPositions(Scheduler):
    def land(self, lane: int, samples: Iterable[Sample]) -> None:
        samples = list(samples)
        for sample in samples:
            if decoding := self._running.get(sample.request_id):
                sample.position = decoding.answer.prompt_length + len(decoding.answer.tokens)
        super().land(lane, samples)


class AcceptsAnyLane(Scheduler):
    def land(self, lane: int, samples: Iterable[Sample]) -> None:
        samples = list(samples)
        for sample in samples:
            decoding = self._running.get(sample.request_id)
            if isinstance(decoding, SharedText):
                decoding.primary_lane = lane
                if isinstance(decoding, DeferralDecoding):
                    decoding.window.clear()
                decoding.known[lane] = len(decoding.answer.tokens)
        super().land(lane, samples)


class ForgetsTokenOfExtension(Scheduler):
    def plan(self, lane: int) -> LaneWork:
        work = super().plan(lane)
        work.extend = [msgspec.structs.replace(item, tokens=item.tokens[-1:]) for item in work.extend]
        return work


class RepeatsTokenOfExtension(Scheduler):
    def plan(self, lane: int) -> LaneWork:
        work = super().plan(lane)
        work.extend = [msgspec.structs.replace(item, tokens=[item.tokens[0], *item.tokens]) for item in work.extend]
        return work


class ForgetsWhatWasWritten(Scheduler):
    def plan(self, lane: int) -> LaneWork:
        work = super().plan(lane)
        work.add = [item._replace(written=[]) for item in work.add]
        return work


class ForgetsRemovalInExpert(Scheduler):
    def plan(self, lane: int) -> LaneWork:
        work = super().plan(lane)
        if lane == 1:
            work.remove = []
        return work


class ForgetsToCallOffWork(Scheduler):
    """An ended request stays due."""

    def abort(self, request_id: str) -> None:
        due = [request_id in book.due for book in self._books]
        decoding = self._running.get(request_id)
        super().abort(request_id)
        for book, was_due in zip(self._books, due, strict=True):
            if was_due and decoding is not None:
                book.due[request_id] = decoding


class SendsLastDeltaTwice(Scheduler):
    def take_deltas(self) -> list[Delta]:
        deltas = super().take_deltas()
        return deltas + [delta for delta in deltas if delta.finish_reason == "stop"]


class AdmitsOneTooMany(Scheduler):
    def _admit(self) -> None:
        self._max_num_seqs += 1
        super()._admit()
        self._max_num_seqs -= 1


class AsksForTheLastDeferralOnly(Scheduler):
    def plan(self, lane: int) -> LaneWork:
        work = super().plan(lane)
        work.add = [item._replace(asked=()) for item in work.add]
        work.extend = [msgspec.structs.replace(item, asked=()) for item in work.extend]
        return work


class LosesTokenWhenPreempted(StandinLane):
    """A dropped row comes back without its last token."""

    def preempt(self, request_id: str) -> None:
        super().preempt(request_id)
        row = self._rows[request_id]
        if len(row.tokens) > len(row.request.prompt):
            row.tokens.pop()


class NeverComesBack(StandinLane):
    """A row that was dropped while it was computed is never computed again."""

    def preempt(self, request_id: str) -> None:
        super().preempt(request_id)
        self._rows[request_id].preempted = True


def loses_deferrals(self: Sequence, token: Token) -> None:
    WRITE(self, msgspec.structs.replace(token, deferral=None))


def advances_draws(self: DeferralDecoding, sample: Sample) -> tuple[int, float | None]:
    """Draws from a generator: what is drawn depends on how often was drawn before."""
    decision = DECIDE(self, sample)
    self.draws += 1
    return decision


def keeps_what_was_rejected(self: DeferralDecoding) -> None:
    """Lanes are not told that their drafts were cut."""
    known = list(self.known)
    CUT(self)
    self.known = known


def trusts_every_draft(self: DeferralDecoding) -> Iterator[Decision]:
    """The expert is asked for the first deferral of a window only, and the rest is believed."""
    for draft in self.window:
        draft.writer = BASE
    return COMMIT(self)


def counts_no_prompt(self: SharedText, *given: Any) -> None:
    BEGIN(self, *given)
    self.prompt_lengths = [0] * len(self.prompts)


BEGIN = SharedText.__init__
WRITE, DECIDE, CUT = Sequence.write, DeferralDecoding._decide, DeferralDecoding._cut
COMMIT = DeferralDecoding._commit_drafts
SABOTAGED_SCHEDULERS = (
    AcceptsOldPositions, AcceptsAnyLane, ForgetsTokenOfExtension, RepeatsTokenOfExtension, ForgetsWhatWasWritten,
    ForgetsRemovalInExpert, ForgetsToCallOffWork, SendsLastDeltaTwice, AdmitsOneTooMany,
    AsksForTheLastDeferralOnly,
)  # fmt: skip
SABOTAGED_LANES = (LosesTokenWhenPreempted, NeverComesBack)
PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no expert stands back": lambda patch: patch.setattr(DeferralDecoding, "_stands_back", lambda *_: False),
    "drafts go on where a veto makes room": lambda patch: patch.setattr(
        DeferralDecoding, "_hangs_on_a_veto", property(lambda _: False)
    ),
    "deferrals are lost": lambda patch: patch.setattr(Sequence, "write", loses_deferrals),
    "max_expert_tokens is not looked at": lambda patch: patch.setattr(DeferralDecoding, "may_defer", True),
    "draws are advanced": lambda patch: patch.setattr(DeferralDecoding, "_decide", advances_draws),
    "what was rejected is kept": lambda patch: patch.setattr(DeferralDecoding, "_cut", keeps_what_was_rejected),
    "every draft is trusted": lambda patch: patch.setattr(DeferralDecoding, "_commit_drafts", trusts_every_draft),
    "a position does not count the prompt": lambda patch: patch.setattr(SharedText, "__init__", counts_no_prompt),
}


def must_be_found(machine: type[SchedulerMachine], focus: Focus = "deferral") -> None:
    # What has nothing to do with the fault would take the examples that show it.
    hunt(type("Focused", (machine,), {"focus": focus}), max_examples=4000, stateful_step_count=40)


def hunt(machine: type[RuleBasedStateMachine], **size: int) -> None:
    """The machine finds something wrong. Found is enough: what it shrinks to is of no interest."""
    how = settings(
        phases=[Phase.generate], database=None, derandomize=True, print_blob=False, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), **size,
    )  # fmt: skip
    with pytest.raises((AssertionError, LookupError, ValueError)):
        run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("sabotaged", SABOTAGED_SCHEDULERS)
def test_finds_sabotaged_scheduler(sabotaged: type[Scheduler]) -> None:
    must_be_found(type("Machine", (SchedulerMachine,), {"scheduler_type": sabotaged}))


@pytest.mark.parametrize("sabotaged", SABOTAGED_LANES)
def test_finds_sabotaged_lane(sabotaged: type[StandinLane]) -> None:
    must_be_found(type("Machine", (SchedulerMachine,), {"lane_types": (sabotaged, sabotaged)}))


@pytest.mark.parametrize("sabotage", PATCHES)
def test_finds_patch(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PATCHES[sabotage](monkeypatch)
    must_be_found(SchedulerMachine, "veto" if "veto" in sabotage else "deferral")

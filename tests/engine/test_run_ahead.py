"""Run-ahead by hand: windows that stand, windows that are cut, and where the base stops drafting."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.lanes import Extension, Sample
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.strategies.deferral.pacing import Agreement
from engine.types import Delta, StructuredOutputs, TokenLogprobs
from tests.engine.builders import BASE_WRITES, EXPERT_WRITES, make_scheduler, request, sample
from tests.engine.oracle import Pair


def scheduler(**options: Any) -> Scheduler:
    of_pair = {name: options.pop(name) for name in list(options) if name in Pair.__dataclass_fields__}
    return make_scheduler(Pair(**of_pair), **options)


def draft(it: Scheduler, *tokens: tuple[int, float], position: int = 3, expect_more: bool = True) -> None:
    """The base samples these (token, gate) one after the other, each after it was told of the one before."""
    for number, (token, gate) in enumerate(tokens):
        it.plan(0)
        it.land(0, [sample(position=position + number, token=token, gate=gate)])
    assert bool(it._books[0].due) is expect_more


def written(it: Scheduler) -> Delta:
    (delta,) = it.take_deltas()
    return delta


def test_a_window_that_stands_takes_one_visit_of_the_expert() -> None:
    it = scheduler()
    it.add(request(max_tokens=9, run_ahead=4))
    draft(it, (7, EXPERT_WRITES), (8, BASE_WRITES), (9, EXPERT_WRITES), (4, BASE_WRITES))
    assert it.take_deltas() == [], "nothing is written while the expert has not spoken"
    (new,) = it.plan(1).add
    assert (new.written, new.final, new.asked) == ([7, 8], 0, (3,))
    it.land(1, [sample(position=3, token=7), sample(position=5, token=9)])
    delta = written(it)
    assert delta.tokens == [7, 8, 9, 4]
    assert delta.sources == [1, 0, 1, 0]
    assert [probability > 0.5 for probability in delta.deferrals if probability is not None] == [True, False] * 2
    assert (it.counters.runahead_accepted, it.counters.runahead_discarded) == (3, 0)
    # The base was told of three drafts; the fourth is news to it.
    assert it.plan(0).extend == [Extension("a", 3, [4], 4)]
    assert not it.plan(1)


def test_the_first_difference_ends_a_window_in_both_lanes() -> None:
    it = scheduler()
    it.add(request(max_tokens=9, run_ahead=4))
    draft(it, (7, EXPERT_WRITES), (8, BASE_WRITES), (9, EXPERT_WRITES), (4, EXPERT_WRITES))
    it.plan(1)
    it.land(1, [sample(position=3, token=7), sample(position=5, token=5), sample(position=6, token=4)])
    delta = written(it)
    assert (delta.tokens, delta.sources) == ([7, 8, 5], [1, 0, 1])
    assert (it.counters.runahead_accepted, it.counters.runahead_discarded) == (2, 1)
    assert it.plan(0).extend == [Extension("a", 2, [5], 3)]
    assert not it.plan(1)
    it.land(0, [sample(position=6, token=2, gate=EXPERT_WRITES)])
    # The expert keeps what it shares with the true text, and no more.
    assert it.plan(1).extend == [Extension("a", 2, [5], 3)]
    it.land(1, [sample(position=6, token=1)])
    assert written(it).tokens == [1]


def test_a_draft_under_way_is_stale_once_the_window_is_cut() -> None:
    it = scheduler()
    it.add(request(max_tokens=9, run_ahead=4))
    draft(it, (7, EXPERT_WRITES))
    it.plan(0)  # the base begins to compute after its draft
    it.plan(1)
    it.land(1, [sample(position=3, token=5)])
    it.land(0, [sample(position=4, token=9)])
    assert written(it).tokens == [5]
    assert it.plan(0).extend == [Extension("a", 0, [5], 1)]


def test_a_draft_under_way_is_of_use_if_the_window_stands() -> None:
    it = scheduler()
    it.add(request(max_tokens=9, run_ahead=4))
    draft(it, (7, EXPERT_WRITES))
    it.plan(0)
    it.plan(1)
    it.land(1, [sample(position=3, token=7)])
    assert not it.plan(0), "the base is looking at the next position already"
    it.land(0, [sample(position=4, token=9)])
    assert written(it).tokens == [7, 9]


def test_drafts_that_wait_count_as_expert_tokens() -> None:
    it = scheduler()
    it.add(request(policy="always", max_tokens=9, max_expert_tokens=2, run_ahead=9))
    draft(it, *[(7, EXPERT_WRITES)] * 4)
    it.plan(1)
    it.land(1, [sample(position=3, token=7), sample(position=4, token=7)])
    delta = written(it)
    assert (delta.tokens, delta.sources) == ([7] * 4, [1, 1, 0, 0])


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"run_ahead": 2}, [(7, EXPERT_WRITES), (8, BASE_WRITES), (9, EXPERT_WRITES)]),
        ({"run_ahead": 9, "max_tokens": 2}, [(7, EXPERT_WRITES), (8, BASE_WRITES)]),
        ({"run_ahead": 9, "prompt": range(1, 62), "max_tokens": 20}, [(7, EXPERT_WRITES), (8, 1.0), (9, 1.0)]),
        ({"run_ahead": 9, "stop_token_ids": (8,)}, [(7, EXPERT_WRITES), (8, BASE_WRITES)]),
        ({"run_ahead": 9, "ignore_eos": False}, [(7, EXPERT_WRITES), (0, EXPERT_WRITES)]),
        ({"run_ahead": 9, "min_tokens": 1}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": 9, "min_tokens": 2}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": "off"}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": None}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": 9, "presence_penalty": 1.0}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": 9, "frequency_penalty": 1.0}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": 9, "repetition_penalty": 1.5}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": 9, "min_p": 0.1}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": 9, "logit_bias": {1: 1.0}}, [(7, EXPERT_WRITES)]),
        ({"run_ahead": 9, "structured_outputs": StructuredOutputs(regex="a")}, [(7, EXPERT_WRITES)]),
    ],
)
def test_where_the_base_stops_drafting(fields: dict[str, Any], tokens: list[tuple[int, float]]) -> None:
    it = scheduler()
    new = request(**{"max_tokens": 9, **fields})
    it.add(new)
    draft(it, *tokens[:-1], position=len(new.prompt), expect_more=len(tokens) > 1)
    draft(it, tokens[-1], position=len(new.prompt) + len(tokens) - 1, expect_more=False)


def test_automatic_windows_end_where_drafts_do_not_pay() -> None:
    asked: list[float] = []

    def worth(probability: float) -> bool:
        asked.append(probability)
        return probability > 0.2

    it = scheduler(run_ahead="auto", draft_pays=worth)
    it.add(request(policy="always", max_tokens=30))
    draft(it, (7, EXPERT_WRITES), (7, EXPERT_WRITES), (7, EXPERT_WRITES), expect_more=False)
    assert asked == [0.5, 0.25, 0.125], "nothing is known of this expert's agreement yet"
    it.plan(1)
    it.land(1, [sample(position=position, token=7) for position in (3, 4, 5)])
    draft(it, (7, EXPERT_WRITES), position=6)
    assert 0.5 < asked[-1] < 1.0


def test_agreement_is_learned_without_run_ahead_too() -> None:
    it = scheduler()
    it.add(request(policy="always", max_tokens=30))
    for position in range(3, 23):
        it.plan(0)
        it.land(0, [sample(position=position, token=7)])
        it.plan(1)
        it.land(1, [sample(position=position, token=8)])
    assert isinstance(it._strategy, Strategies)
    assert it._strategy.deferral.agreement[1].rate < 0.1


def test_agreement_forgets() -> None:
    agreement = Agreement()
    assert agreement.rate == 0.5
    for _ in range(2000):
        agreement.observe(True)
    assert agreement.rate > 0.99
    for _ in range(2000):
        agreement.observe(False)
    assert agreement.rate < 0.01


def test_another_expert_ends_a_window_and_begins_the_next() -> None:
    it = scheduler(experts=2)
    it.add(request(max_tokens=9, run_ahead=9))

    def look(position: int, token: int, first: float, second: float) -> None:
        it.plan(0)
        it.land(0, [Sample("a", position, token, [first, second])])

    look(3, 7, 3.0, -3.0)
    look(4, 8, -3.0, -3.0)
    look(5, 9, -3.0, 3.0)
    assert not it.plan(0)
    assert not it.plan(2), "the second expert is asked when all before it is written"
    (new,) = it.plan(1).add
    assert (new.written, new.asked) == ([], ())
    it.land(1, [sample(position=3, token=7)])
    assert written(it).tokens == [7, 8]
    (new,) = it.plan(2).add
    assert (new.written, new.final) == ([7, 8], 2)
    it.land(2, [sample(position=5, token=1)])
    delta = written(it)
    assert (delta.tokens, delta.sources) == ([1], [2])


@pytest.mark.parametrize("expert_failure", ["base", "error"])
def test_a_lost_expert_and_a_window(expert_failure: str) -> None:
    it = scheduler(expert_failure=expert_failure)
    it.add(request(max_tokens=9, run_ahead=9))
    draft(it, (7, EXPERT_WRITES), (8, BASE_WRITES), (9, EXPERT_WRITES), (4, BASE_WRITES))
    it.plan(1)
    it.lose(1)
    delta = written(it)
    if expert_failure == "base":
        assert (delta.tokens, delta.sources) == ([7, 8, 9, 4], [0] * 4)
        assert it.counters.expert_failures == 2
        it.regain(1)
        it.land(1, [sample(position=3, token=5), sample(position=5, token=5)])
        assert it.take_deltas() == []
    else:
        assert (delta.finish_reason, delta.tokens) == ("error", [])
        assert it.counters.runahead_discarded == 3
        assert it.plan(0).remove == ["a"]
        assert it.plan(1).remove == ["a"]


def test_an_aborted_window_leaves_nothing_behind() -> None:
    it = scheduler()
    it.add(request(max_tokens=9, run_ahead=9))
    draft(it, (7, EXPERT_WRITES), (8, BASE_WRITES))
    it.plan(1)
    it.abort("a")
    delta = written(it)
    assert (delta.tokens, delta.finish_reason) == ([], "aborted")
    assert (it.counters.runahead_accepted, it.counters.runahead_discarded) == (0, 1)
    assert it.outlook(1).parked == 0
    assert it.plan(0).remove == ["a"]
    assert it.plan(1).remove == ["a"]
    assert it.idle


def test_logprobs_are_those_of_the_writer() -> None:
    it = scheduler()
    it.add(request(max_tokens=9, run_ahead=9, logprobs=0))
    for position, token, gate in ((3, 7, EXPERT_WRITES), (4, 8, BASE_WRITES)):
        it.plan(0)
        entry = TokenLogprobs([token], [-0.1], 1)
        it.land(0, [sample(position=position, token=token, gate=gate, logprobs=entry)])
    it.plan(1)
    it.land(1, [sample(position=3, token=7, logprobs=TokenLogprobs([7], [-0.2], 1))])
    delta = written(it)
    assert delta.logprobs is not None
    assert [entry.logprobs for entry in delta.logprobs] == [[-0.2], [-0.1]]


@pytest.mark.parametrize(("run_ahead", "seeded"), [("auto", True), (3, True), ("off", False), (None, False)])
def test_both_lanes_draw_alike_where_the_base_runs_ahead(run_ahead: Any, seeded: bool) -> None:
    it = scheduler()
    it.add(request(seed=None, temperature=1.0, run_ahead=run_ahead))
    (in_base,) = it.plan(0).add
    it.land(0, [sample(position=3, token=7, gate=EXPERT_WRITES)])
    (in_expert,) = it.plan(1).add
    assert (in_base.sampling.seed is not None) is seeded
    assert in_base.sampling.seed == in_expert.sampling.seed


def test_a_member_alone_draws_from_the_lanes_own_noise() -> None:
    it = scheduler()
    it.add(request(seed=None, temperature=1.0, run_ahead="auto", member=0))
    (in_base,) = it.plan(0).add
    assert in_base.sampling.seed is None


def test_waits_are_counted_once_a_deferral() -> None:
    now = [0.0]
    it = scheduler(clock=lambda: now[0])
    it.add(request(max_tokens=9, run_ahead=4))
    draft(it, (7, EXPERT_WRITES), (8, BASE_WRITES), (9, EXPERT_WRITES))
    it.plan(1)
    now[0] = 2.0
    it.land(1, [sample(position=3, token=7), sample(position=5, token=9)])
    assert it.take_expert_waits() == [2.0, 0.0]


@pytest.mark.parametrize("stands", [True, False])
def test_what_goes_wrong_in_a_draft_counts_only_if_the_text_comes_that_far(stands: bool) -> None:
    """Step by step, a position that is cut would never have been looked at."""
    for gate, token in ((math.nan, 8), (BASE_WRITES, 99)):
        it = scheduler(vocab_size=16)
        it._terms = [terms._replace(vocab_size=16) for terms in it._terms]
        it.add(request(max_tokens=9, run_ahead=9))
        draft(it, (7, EXPERT_WRITES), (token, gate), expect_more=False)
        it.plan(1)
        it.land(1, [sample(position=3, token=7 if stands else 5)])
        delta = written(it)
        assert delta.tokens == [7 if stands else 5]
        assert (delta.finish_reason == "error") is stands
        assert (delta.error is not None) is stands
        if not stands:
            assert it.plan(0).extend == [Extension("a", 0, [5], 1)]


def test_a_lane_that_comes_back_is_not_asked_for_what_was_given_up() -> None:
    """Parked while the lane's step was under way, so that the lane was never told; then written by the base."""
    it = scheduler(expert_failure="base")
    it.add(request(max_tokens=9))
    draft(it, (7, EXPERT_WRITES), expect_more=False)
    it.lose(1)
    assert written(it).tokens == [7]
    it.regain(1)
    assert not it.plan(1)

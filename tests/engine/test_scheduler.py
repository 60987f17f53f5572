"""The scheduler by hand: what it tells the lanes, what it makes of their samples, what it hands out."""

from __future__ import annotations

from typing import Any

import pytest

from engine.lanes import Extension, LaneWork, Refusal
from engine.scheduler import Scheduler
from engine.types import Delta, ErrorCode, GenerationRequest, TokenLogprobs
from tests.engine.builders import BASE_WRITES, EXPERT_WRITES, Rig, make_scheduler, mixed_requests, request, sample
from tests.engine.oracle import Pair, check, complete

ENTRY = TokenLogprobs([5], [-1.0], 1)


def scheduler(**options: Any) -> Scheduler:
    """A base and an expert, the gate's threshold 0.5; ``options`` that are not the pair's are the scheduler's."""
    of_pair = {name: options.pop(name) for name in list(options) if name in Pair.__dataclass_fields__}
    return make_scheduler(Pair(**of_pair), **options)


def ids(work: LaneWork) -> list[str]:
    return [item.request_id for item in work.add]


def only(deltas: list[Delta]) -> Delta:
    (delta,) = deltas
    return delta


# -- admission ------------------------------------------------------------------------------------------------


def test_admits_in_order_up_to_the_limit() -> None:
    it = scheduler(max_num_seqs=2)
    for name in "abc":
        it.add(request(name))
    assert (it.running, it.waiting) == (0, 3)
    assert ids(it.plan(0)) == ["a", "b"]
    assert (it.running, it.waiting) == (2, 1)
    assert not it.plan(0)
    it.abort("a")
    work = it.plan(0)
    assert (work.remove, ids(work)) == (["a"], ["c"])


def test_one_that_waits_can_be_aborted_and_no_lane_hears_of_it() -> None:
    it = scheduler(max_num_seqs=1)
    it.add(request("a"))
    it.add(request("b"))
    it.plan(0)
    it.abort("b")
    assert only(it.take_deltas()).finish_reason == "aborted"
    it.abort("a")
    assert it.plan(0) == LaneWork(remove=["a"])


def test_a_member_alone_touches_no_other_lane() -> None:
    rig = Rig(experts=2)
    rig.add(request("a", member=2))
    assert rig.told(0) == []
    assert rig.told(1) == []
    assert [item.request_id for item in rig.told(2)] == ["a"]
    written = rig.run()["a"]
    assert written.sources == [2] * 4
    assert written.deferrals == [None] * 4


def test_waiting_for_a_lane_blocks_nobody() -> None:
    rig = Rig()
    parked, other = request("parked", policy="always"), request("other", [4], policy="never", max_tokens=10)
    rig.add(parked, other)
    for _ in range(10):
        rig.step(0)
    rig.deltas()
    assert rig.ledger.got.keys() == {"other"}
    check(rig.ledger.got["other"], other, rig.pair)
    check(rig.run()["parked"], parked, rig.pair)


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1] * 64}, "prompt has 64 tokens, the context is 64"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"member": 2}, "member 2 does not exist"),
        ({"member": -1}, "member -1 does not exist"),
        ({"experts": (2,)}, "experts names a lane that does not exist"),
        ({"experts": (0,)}, "experts names a lane that does not exist"),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any], problem: str) -> None:
    it = scheduler()
    it.add(request("good"))
    it.add(request("bad", **fields))
    delta = only(it.take_deltas())
    assert (delta.request_id, delta.finish_reason, delta.error) == ("bad", "error", problem)
    assert (delta.tokens, delta.sources, delta.deferrals) == ([], [], [])
    assert ids(it.plan(0)) == ["good"]


def test_what_a_lane_refuses_is_refused() -> None:
    asked: list[str] = []

    def refusal(new: GenerationRequest) -> Refusal | None:
        asked.append(new.request_id)
        return Refusal("no room", ErrorCode.INVALID_GRAMMAR) if max(new.prompt) > 9 else None

    it = scheduler(reject_reason=refusal)
    it.add(request("good"))
    it.add(request("bad", [10]))
    it.add(request("empty", []))
    deltas = it.take_deltas()
    assert [(delta.error, delta.code) for delta in deltas] == [
        ("no room", ErrorCode.INVALID_GRAMMAR),
        ("prompt is empty", ErrorCode.INVALID_REQUEST),
    ]
    assert all(delta.refused for delta in deltas)
    assert ids(it.plan(0)) == ["good"]
    assert asked == ["good", "bad"], "once, and not of what is refused anyway"


@pytest.mark.parametrize("policy", ["threshold", "sample"])
def test_without_a_gate(policy: str) -> None:
    it = scheduler(has_gate=False, policy="never")
    it.add(request("refused", policy=policy))
    assert only(it.take_deltas()).error == f"policy {policy!r} needs a gate, and none is served"
    for name in ("always", "never", "random", "confidence", None):
        it.add(request(str(name), policy=name))
    it.add(request("alone", policy=policy, member=1))
    it.add(request("no experts", policy=policy, experts=()))
    assert it.take_deltas() == []
    assert it.running + it.waiting == 7


def test_an_id_in_use_is_refused() -> None:
    rig = Rig()
    first = request("a", [7, 8])
    rig.add(first)
    for twice in ("waiting", "running"):
        rig.scheduler.add(request("a"))
        assert only(rig.scheduler.take_deltas()).error == "request_id is already in use", twice
        rig.step(0)
    check(rig.run()["a"], first, rig.pair)


def test_a_refused_duplicate_hides_nothing() -> None:
    """What the first one gained and the second one's refusal are both handed out, whichever came first."""
    it = scheduler()
    it.add(request("a"))
    it.plan(0)
    it.add(request("a"))
    it.land(0, [sample()])
    it.add(request("a"))
    deltas = it.take_deltas()
    assert [delta.finish_reason for delta in deltas].count("error") == 2
    assert [delta.tokens for delta in deltas].count([5]) == 1


def test_an_id_can_be_used_again_before_its_last_delta_was_taken() -> None:
    it = scheduler()
    it.add(request("a"))
    it.plan(0)
    it.abort("a")
    it.add(request("a"))
    it.plan(0)
    it.land(0, [sample()])
    assert [(delta.tokens, delta.finish_reason) for delta in it.take_deltas()] == [([], "aborted"), ([5], None)]


def test_an_expert_named_twice_does_not_count_twice() -> None:
    it = scheduler()
    it.add(request("a", experts=(1, 1), policy="never"))
    it.plan(0)
    it.land(0, [sample(gate=0.0)])
    delta = only(it.take_deltas())
    assert delta.finish_reason == "error" or delta.deferrals == [0.5]


# -- who writes -----------------------------------------------------------------------------------------------


def test_a_lane_is_told_all_since_its_last_visit() -> None:
    it = scheduler()
    it.add(request("a", max_tokens=10))
    assert it.plan(0).add[0].written == []
    for position in (3, 4):
        it.land(0, [sample(position=position, token=position, gate=BASE_WRITES)])
        assert it.plan(0).extend == [Extension("a", position - 3, [position], position - 2)]
    it.land(0, [sample(position=5, gate=EXPERT_WRITES)])
    assert not it.plan(0)
    assert it.plan(1).add[0].written == [3, 4]
    it.land(1, [sample(position=5, token=9)])
    assert it.plan(0).extend == [Extension("a", 2, [9], 3)]
    it.land(0, [sample(position=6, token=6, gate=BASE_WRITES)])
    it.plan(0)
    it.land(0, [sample(position=7, gate=EXPERT_WRITES)])
    assert it.plan(1).extend == [Extension("a", 2, [9, 6], 4)]
    delta = only(it.take_deltas())
    assert (delta.tokens, delta.sources) == ([3, 4, 9, 6], [0, 0, 1, 0])


def test_the_base_looks_at_every_position() -> None:
    for policy in ("always", "never", "random"):
        rig = Rig()
        rig.add(request(policy=policy, rate=0.5))
        assert None not in rig.run()["a"].deferrals


def test_max_expert_tokens() -> None:
    rig = Rig()
    rig.add(request("none", policy="always", max_expert_tokens=0), request("two", policy="always", max_expert_tokens=2))
    got = rig.run()
    assert got["none"].sources == [0, 0, 0, 0]
    assert got["two"].sources == [1, 1, 0, 0]
    assert None not in got["none"].deferrals


@pytest.mark.parametrize(
    ("top_probability", "threshold", "writer"), [(0.6, None, 0), (0.4, None, 1), (0.5, None, 0), (0.6, 0.3, 1)]
)
def test_confidence_has_a_threshold_of_its_own(top_probability: float, threshold: float | None, writer: int) -> None:
    """The gate's threshold, here 0.1, is on another scale."""
    it = scheduler(threshold=0.1)
    it.add(request("a", policy="confidence", threshold=threshold))
    it.plan(0)
    it.land(0, [sample(gate=BASE_WRITES, top_probability=top_probability)])
    assert (ids(it.plan(1)) == ["a"]) == (writer == 1)
    it.land(writer, [sample()] if writer else [])
    delta = only(it.take_deltas())
    assert delta.sources == [writer]
    assert delta.deferrals == pytest.approx([1 - top_probability])


@pytest.mark.parametrize(
    ("fields", "policy", "threshold", "experts"),
    [
        ({}, "threshold", 0.1, (1, 2)),
        ({"threshold": 0.4, "experts": (2,)}, "threshold", 0.4, (2,)),
        ({"policy": "confidence"}, "confidence", 0.5, (1, 2)),
        ({"policy": "sample", "threshold": 0.4}, "sample", None, (1, 2)),
        ({"member": 1}, None, None, None),
    ],
)
def test_the_first_delta_tells_what_is_in_force(
    fields: dict[str, Any], policy: str | None, threshold: float | None, experts: tuple[int, ...] | None
) -> None:
    rig = Rig(experts=2, threshold=0.1)
    rig.add(request("a", **fields))
    for _ in range(3):
        for lane in range(3):
            rig.step(lane)
    told = only(rig.scheduler.take_deltas()).collaboration
    assert told is not None
    assert (told.policy, told.threshold, told.experts) == (policy, threshold, experts)
    while rig.scheduler.running:
        for lane in range(3):
            rig.step(lane)
    assert all(delta.collaboration is None for delta in rig.scheduler.take_deltas())


def test_only_the_base_is_asked_for_its_top_probability() -> None:
    it = scheduler()
    it.add(request("a", policy="confidence"))
    it.add(request("b", policy="threshold"))
    it.add(request("c", policy="confidence", member=0))
    assert [item.wants_top_probability for item in it.plan(0).add] == [True, False, False]
    it.land(0, [sample(top_probability=0.0)])
    assert [item.wants_top_probability for item in it.plan(1).add] == [False]


def test_only_the_home_lane_is_asked_for_prompt_logprobs() -> None:
    it = scheduler()
    it.add(request("a", policy="always", prompt_logprobs=1, logprobs=2))
    it.add(request("alone", member=1, prompt_logprobs=1))
    assert [item.sampling.prompt_logprobs for item in it.plan(0).add] == [1]
    it.land(0, [sample(prompt_logprobs=[ENTRY], logprobs=ENTRY)])
    told = {item.request_id: item.sampling for item in it.plan(1).add}
    assert told["a"].prompt_logprobs is None
    assert told["alone"].prompt_logprobs == 1
    assert told["a"].logprobs == 2
    it.land(1, [sample(logprobs=ENTRY)])
    assert only(it.take_deltas()).prompt_logprobs == [ENTRY]


def test_a_stale_sample_brings_no_prompt_logprobs() -> None:
    it = scheduler()
    it.add(request("a", prompt_logprobs=1))
    it.plan(0)
    first = sample(prompt_logprobs=[ENTRY])
    it.land(0, [first])
    assert only(it.take_deltas()).prompt_logprobs == [ENTRY]
    it.land(0, [first])
    it.plan(0)
    it.land(0, [sample(position=4)])
    assert only(it.take_deltas()).prompt_logprobs is None


def test_a_sample_of_an_aborted_namesake_is_stale() -> None:
    """The lane was stepping when the first one was aborted, and has not heard of the second one yet."""
    it = scheduler()
    it.add(request("a"))
    it.plan(0)
    it.abort("a")
    it.take_deltas()
    it.add(request("a", [7, 8, 9]))
    it.plan(1)
    it.land(0, [sample()])
    assert it.take_deltas() == []


# -- the end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "token", "reason", "stop_token"),
    [
        ({}, 5, None, None),
        ({"ignore_eos": False}, 0, "stop", 0),
        ({"ignore_eos": True}, 0, None, None),
        ({"ignore_eos": False, "min_tokens": 2}, 0, None, None),
        ({"stop_token_ids": (5,)}, 5, "stop", 5),
        ({"stop_token_ids": (5,), "min_tokens": 2}, 5, None, None),
        ({"stop_token_ids": (0,), "ignore_eos": True}, 0, "stop", 0),
        ({"max_tokens": 1}, 5, "length", None),
        ({"max_tokens": 1, "stop_token_ids": (5,)}, 5, "stop", 5),
        ({"max_tokens": 1, "min_tokens": 2, "stop_token_ids": (5,)}, 5, "length", None),
        ({"prompt": [1] * 63}, 5, "length", None),
    ],
)
@pytest.mark.parametrize("writer", [0, 1])
def test_after_one_token(
    writer: int, fields: dict[str, Any], token: int, reason: str | None, stop_token: int | None
) -> None:
    it = scheduler()
    new = request("a", policy="always" if writer else "never", **fields)
    it.add(new)
    for lane in range(writer + 1):
        it.plan(lane)
        it.land(lane, [sample(position=len(new.prompt), token=token)])
    delta = only(it.take_deltas())
    assert (delta.tokens, delta.sources) == ([token], [writer])
    assert (delta.finish_reason, delta.stop_token) == (reason, stop_token)
    removed = [it.plan(lane).remove for lane in range(2)]
    assert removed == ([["a"]] * (writer + 1) + [[]] * (1 - writer) if reason else [[], []])
    assert it.idle == (reason is not None)


def test_the_context_is_the_end() -> None:
    rig = Rig(max_model_len=20)
    rig.add(request("a", [1] * 12, max_tokens=100))
    written = rig.run()["a"]
    assert (len(written.tokens), written.finish_reason) == (8, "length")


def test_eos_before_min_tokens_is_a_token_like_others() -> None:
    pair = Pair(vocab_size=2)
    early = next(
        new
        for seed in range(100)
        if 0 in complete(new := request("a", [seed % 2] * (seed + 1), min_tokens=6, max_tokens=8), pair).tokens[:5]
    )
    rig = Rig(vocab_size=2)
    ending = request("a", early.prompt, min_tokens=6, max_tokens=8, ignore_eos=False)
    rig.add(ending)
    written = rig.run()["a"]
    check(written, ending, rig.pair)
    assert 0 in written.tokens[:5]
    assert len(written.tokens) >= 6


def test_aborting_frees_both_lanes_at_once() -> None:
    it = scheduler()
    it.add(request("a"))
    it.plan(0)
    it.land(0, [sample(gate=EXPERT_WRITES)])
    it.plan(1)
    it.abort("a")
    assert it.plan(0).remove == it.plan(1).remove == ["a"]
    it.land(1, [sample()])
    assert only(it.take_deltas()).finish_reason == "aborted"
    assert it.idle


def test_aborting_what_is_not_there_is_nothing() -> None:
    it = scheduler()
    it.abort("nobody")
    assert it.take_deltas() == []
    assert it.idle


def test_idle_only_after_all_was_told_and_taken() -> None:
    it = scheduler()
    assert it.idle
    it.add(request("a", max_tokens=1))
    assert not it.idle
    it.plan(0)
    it.land(0, [sample()])
    assert not it.idle
    it.take_deltas()
    assert not it.idle, "the lane has not been told to remove it"
    it.plan(0)
    assert it.idle


# -- results --------------------------------------------------------------------------------------------------


def test_deltas_are_merged_and_in_order_of_first_gain() -> None:
    it = scheduler()
    it.add(request("a", logprobs=0))
    it.add(request("b"))
    it.plan(0)
    it.land(0, [sample("b")])
    it.land(0, [sample("a", logprobs=ENTRY)])
    it.plan(0)
    it.land(0, [sample("b", position=4, token=6)])
    first, second = it.take_deltas()
    assert (first.request_id, first.tokens, first.logprobs) == ("b", [5, 6], None)
    assert (second.request_id, second.tokens, second.logprobs) == ("a", [5], [ENTRY])
    assert len(first.tokens) == len(first.sources) == len(first.deferrals)
    assert it.take_deltas() == []


def test_expert_waits_are_measured_from_parking_to_token() -> None:
    now = 10.0
    it = scheduler(clock=lambda: now)
    it.add(request("a"))
    it.add(request("aborted"))
    it.plan(0)
    it.land(0, [sample("a", gate=EXPERT_WRITES), sample("aborted", gate=EXPERT_WRITES)])
    now = 12.5
    it.abort("aborted")
    assert it.take_expert_waits() == []
    it.plan(1)
    it.land(1, [sample("a")])
    assert it.take_expert_waits() == [2.5]
    it.plan(0)
    now = 20.0
    it.land(0, [sample("a", position=4, gate=BASE_WRITES)])
    assert it.take_expert_waits() == []


def test_without_a_seed_requests_draw_apart() -> None:
    rig = Rig(max_num_seqs=40)
    rig.add(*(request(str(number), policy="random", rate=0.5, seed=None) for number in range(40)))
    sources = {tuple(written.sources) for written in rig.run().values()}
    assert len(sources) > 1


@pytest.mark.parametrize("options", [{}, {"token_budget": 5}, {"kv_tokens": 70}, {"token_budget": 9, "kv_tokens": 64}])
@pytest.mark.parametrize("experts", [0, 1, 3])
def test_many_at_once_equal_brute_force(experts: int, options: dict[str, int]) -> None:
    rig = Rig(options, experts=experts)
    everything = mixed_requests(60, rig.pair, seed=experts)
    rig.add(*everything)
    got = rig.run()
    for one in everything:
        check(got[one.request_id], one, rig.pair)
    assert [lane.leftovers() for lane in rig.lanes] == [[]] * (experts + 1)

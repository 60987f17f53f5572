"""The lane's scheduler, on vLLM's, without a model: a worker that keeps tokens where a real one keeps keys and values.

What it samples is a hash of the tokens that it finds in the KV blocks of a row. So one token that is missing, is
another's, was overwritten, or was not overwritten after a cut changes everything after it.
"""

from __future__ import annotations

import warnings
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from bench.standin import StandinLane, _Row, next_token
from engine.config import LaneConfig
from engine.lanes import Extension, LaneReport, LaneRequest, LaneWork, Sample
from engine.lanes.interface import Launched
from engine.loop import StepLoop
from engine.strategies.deferral.pacing import Pacer
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from engine.vllm_hooks.options import engine_arguments, prepare_environment
from engine.vllm_hooks.wire import EDITS, LaneEdits
from tests.engine.builders import make_scheduler, mixed_requests, request
from tests.engine.oracle import Ledger, Pair, check
from tests.oracle import pairs

prepare_environment((LaneConfig(model="none"),))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from engine.vllm_hooks.parking import Speed, idle_row
    from engine.vllm_hooks.scheduler import LaneScheduler

BLOCK = 4
Coordination = Literal["lockstep", "overlapped"]
PAIR = Pair(experts=1)


@pytest.fixture(scope="module")
def vllm_config() -> Any:
    arguments = engine_arguments(
        LaneConfig(
            model=str(pairs.DEMO / "base"),
            vllm={"dtype": "float32", "max_model_len": PAIR.max_model_len, "max_num_batched_tokens": 32},
        ),
        label="base",
        max_num_seqs=8,
        vocab_size=PAIR.vocab_size,
        gate_path=None,
        gate_in_head=False,
    )
    return EngineArgs(**arguments).create_engine_config()


class TokenWorkerLane(StandinLane):
    """A lane on a :class:`LaneScheduler`; its worker is in :meth:`start`."""

    def __init__(self, *args: Any, config: Any, blocks: int, depth: int, **options: Any) -> None:
        super().__init__(*args, **options)
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = LaneScheduler(
            vllm_config=config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        self._depth = depth
        self.scheduler.runner_records = depth == 0
        self.scheduler.looks_ahead = depth > 1
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK, hash_function)
        # The worker's: what lies in the KV blocks, block tables, output tokens as far as it knows them, last samples.
        self._kv = [[-1] * BLOCK for _ in range(blocks)]
        self._blocks: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}
        self._last: dict[str, int] = {}
        self._flying: deque[dict[tuple[str, int, bool], Sample]] = deque()
        self.ahead = 0

    @property
    def depth(self) -> int:
        return self._depth

    def apply(self, work: LaneWork) -> None:
        self.scheduler.remove(work.remove)
        for request_id in work.remove:
            self._rows.pop(request_id, None)
        for added in work.add:
            self._rows[added.request_id] = _Row(added)
            params = SamplingParams(
                temperature=0.0,
                max_tokens=PAIR.max_model_len,
                prompt_logprobs=added.sampling.prompt_logprobs,
                min_tokens=min(added.sampling.min_tokens, PAIR.max_model_len),
            )
            made = Request(
                added.request_id, list(added.prompt), params, None, block_hasher=self._hasher, priority=added.order
            )
            self.scheduler.add_lane_request(made, added, lambda: None)
        for extension in work.extend:
            self.scheduler.extend(extension)

    def has_work(self) -> bool:
        return self.scheduler.has_runnable()

    @property
    def starved(self) -> int | None:
        return self.scheduler.starved

    def make_room(self) -> None:
        self.scheduler.make_room()

    def start(self) -> Future[LaneReport]:
        scheduled = self.scheduler.schedule()
        samples = self._execute(scheduled)
        self._flying.append(samples)
        rows = list(scheduled.num_scheduled_tokens)
        ends = {request_id: sample.token for (request_id, _, asked), sample in samples.items() if not asked}
        self._last = ends
        output = SimpleNamespace(
            req_id_to_index={request_id: number for number, request_id in enumerate(rows)},
            sampled_token_ids=[[ends[row]] if row in ends else [] for row in rows],
        )
        asked = [sample.token for (_, _, of_asked), sample in samples.items() if of_asked]

        def collect() -> LaneReport:
            assert self._flying.popleft() is samples
            landed = self.scheduler.collect(scheduled, output, asked)
            found = [samples[each.request.request_id, each.position, each.asked] for each in landed]
            return LaneReport(found, 1e-3, scheduled.total_num_scheduled_tokens, len(rows))

        if self._depth:
            return Launched(collect)
        future: Future[LaneReport] = Future()
        future.set_result(collect())
        return future

    def leftovers(self) -> list[str]:
        pool = self.scheduler.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return [*self.scheduler.requests, *self.scheduler.bookkeeping(), *([f"{held} blocks"] if held else [])]

    def flush(self) -> None:
        self.scheduler.schedule_nothing()

    def _execute(self, scheduled: Any) -> dict[tuple[str, int, bool], Sample]:
        edits: LaneEdits = getattr(scheduled, EDITS)
        self.ahead += len(edits.ahead)
        begins: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
            self._outputs[new.req_id] = []
            begins[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for request_id, begin, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self._blocks[request_id] = []
            self._blocks[request_id] += blocks[0] if blocks is not None else []
            begins[request_id] = begin
        for request_id, edit in edits.tokens.items():
            assert edit.start <= len(self._outputs[request_id]), "an edit leaves a gap"
            self._outputs[request_id][edit.start :] = edit.tokens
        asked: dict[tuple[str, int, bool], Sample] = {}
        ends: dict[tuple[str, int, bool], Sample] = {}
        for request_id, count in scheduled.num_scheduled_tokens.items():
            row = self._rows[request_id]
            text = [*row.request.prompt, *self._outputs[request_id]]
            begin, end = begins[request_id], begins[request_id] + count
            if request_id in edits.ahead:
                assert count == 1
                text[end - 1 :] = [self._last[request_id]]
            for place in range(begin, end):
                self._kv[self._blocks[request_id][place // BLOCK]][place % BLOCK] = text[place]
            row.tokens = [self._kv[self._blocks[request_id][place // BLOCK]][place % BLOCK] for place in range(end)]
            for index in edits.asked.get(request_id, ()):
                position = begin + index + 1
                asked[request_id, position, True] = self._sample(row, position, asked=True)
            if end == len(text):
                sample = ends[request_id, end, False] = self._sample(row, end)
                if self.scheduler.runner_records:
                    self._outputs[request_id].append(sample.token)
        order = list(edits.asked)
        asked = dict(sorted(asked.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))
        return asked | ends


def drive(
    config: Any,
    depths: tuple[int, int],
    blocks: int | tuple[int, int],
    requests: list[GenerationRequest],
    aborted: tuple[str, ...] = (),
    coordination: Coordination = "lockstep",
    seconds_per_token: float = 0.0,
) -> tuple[Ledger, list[TokenWorkerLane]]:
    lanes = [
        TokenWorkerLane(
            number,
            f"lane-{number}",
            experts=PAIR.experts if number == 0 else 0,
            vocab_size=PAIR.vocab_size,
            max_model_len=PAIR.max_model_len,
            config=config,
            blocks=blocks if isinstance(blocks, int) else blocks[number],
            depth=depth,
        )
        for number, depth in enumerate(depths)
    ]
    for lane in lanes:
        lane.scheduler.speed.observe(1, seconds_per_token)
    scheduler = make_scheduler(PAIR)
    loop = StepLoop(scheduler, list(lanes), coordination, Pacer(PAIR.lanes))
    ledger = Ledger()
    for one in requests:
        scheduler.add(one)
    passes = 0
    while loop.step() or not scheduler.idle:
        ledger.take(scheduler.take_deltas())
        passes += 1
        assert passes < 20_000, "nothing goes on"
        if passes % 5 == 0 and aborted:
            scheduler.abort(aborted[0])
            aborted = aborted[1:]
    ledger.take(scheduler.take_deltas())
    while loop.step():
        pass
    assert loop.stats().integrity_errors == 0
    return ledger, lanes


def without_blends(count: int, seed: int) -> list[GenerationRequest]:
    return [one for one in mixed_requests(count, PAIR, seed) if one.collaboration.blend is None]


@pytest.mark.parametrize("depths", [(0, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("blocks", [400, 20])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seconds_per_token", [0.0, 1.0])
def test_what_is_written_is_what_the_pair_writes(
    vllm_config: Any, depths: tuple[int, int], blocks: int, seed: int, seconds_per_token: float
) -> None:
    """With memory for few; idle rows give theirs up at once, or never while any lane can go on."""
    requests = without_blends(40, seed)
    ledger, lanes = drive(vllm_config, depths, blocks, requests, seconds_per_token=seconds_per_token)
    for one in requests:
        check(ledger.got[one.request_id], one, PAIR)
    assert [lane.leftovers() for lane in lanes] == [[], []]
    assert (lanes[0].ahead > 20) == (depths[0] == 2)
    assert (sum(lane.scheduler.num_preemptions for lane in lanes) > 0) == (blocks == 20)


def long_requests(rate: float) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            str(number),
            [7 + number] * 24,
            SamplingSpec(temperature=0.0, seed=number, max_tokens=20, ignore_eos=True),
            Collaboration(policy="random", rate=rate),
        )
        for number in range(6)
    ]


def test_a_base_with_memory_for_one_gives_nothing_up_meanwhile(vllm_config: Any) -> None:
    requests = long_requests(0.5)
    ledger, lanes = drive(vllm_config, (0, 0), (15, 400), requests, coordination="overlapped")
    for one in requests:
        check(ledger.got[one.request_id], one, PAIR)
    assert lanes[0].scheduler.num_preemptions <= len(requests)


@pytest.mark.parametrize("depths", [(0, 0), (2, 1)])
def test_an_expert_with_memory_for_one(vllm_config: Any, depths: tuple[int, int]) -> None:
    """Who is deferred next gets the memory of a row that has been idle, if computing that again would be quick."""
    requests = long_requests(0.3)
    preemptions = []
    for seconds_per_token in (0.0, 1.0):
        ledger, lanes = drive(vllm_config, depths, (400, 15), requests, seconds_per_token=seconds_per_token)
        for one in requests:
            check(ledger.got[one.request_id], one, PAIR)
        assert lanes[0].scheduler.num_preemptions == 0
        preemptions.append(lanes[1].scheduler.num_preemptions)
    quick, slow = preemptions
    assert quick > slow <= 2 * len(requests)


def test_how_long_a_text_takes_is_known_from_prompts() -> None:
    speed = Speed()
    assert speed.seconds_per_token == 0.0
    speed.observe(0, 1.0)
    assert speed.seconds_per_token == 0.0, "a step without tokens says nothing"
    speed.observe(2, 0.004)
    assert speed.seconds_per_token == pytest.approx(2e-3)
    speed.observe(1000, 0.1)
    assert speed.seconds_per_token == pytest.approx(1e-4, rel=1e-3), "the first prompt"
    for _ in range(1000):
        speed.observe(2, 0.004)
    assert speed.seconds_per_token == pytest.approx(1e-4, rel=0.05), "whatever a few tokens take, and how often"
    for _ in range(10):
        speed.observe(900, 0.18)
    assert speed.seconds_per_token == pytest.approx(2e-4, rel=0.1), "a device that has become slower"


def test_a_row_is_given_up_when_waiting_has_cost_as_much_as_computing_it_again() -> None:
    params = SamplingParams(temperature=0.0)
    short, long = (Request(str(length), [1] * length, params, None) for length in (100, 500))
    assert idle_row([(long, 0.19), (short, 0.03)], 1e-4, held=4) is None
    assert idle_row([(long, 0.19), (short, 0.041)], 1e-4, held=4) is short
    assert idle_row([(long, 0.21), (short, 0.041)], 1e-4, held=4) is long, "the one that has been idle longest"
    assert idle_row([(long, 0.21), (short, 0.041)], 1e-4, held=6) is None, "more rows have to wait for it"


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
@pytest.mark.parametrize("depths", [(0, 0), (2, 1)])
def test_texts_that_fit_one_at_a_time_are_written_in_turn(
    vllm_config: Any, depths: tuple[int, int], coordination: Coordination
) -> None:
    """Each waits for the expert at every other token. Were its memory in the base's lane free then, another text would
    be computed there from its beginning, and so on in turn, for each token.
    """
    requests = long_requests(0.5)
    # One text takes 11 of 4 tokens; a further one is vLLM's.
    ledger, lanes = drive(vllm_config, depths, 15, requests, coordination=coordination, seconds_per_token=1.0)
    for one in requests:
        check(ledger.got[one.request_id], one, PAIR)
    preempted = [lane.scheduler.num_preemptions for lane in lanes]
    assert max(preempted) <= 2 * len(requests), "about once per text, not once per token"


@pytest.mark.parametrize("blocks", [400, 20])
@pytest.mark.parametrize("seed", range(3))
def test_aborts(vllm_config: Any, blocks: int, seed: int) -> None:
    requests = without_blends(40, seed + 10)
    ids = [one.request_id for one in requests]
    ledger, lanes = drive(vllm_config, (2, 1), blocks, requests, tuple(ids[::2]))
    for one in requests:
        check(ledger.got[one.request_id], one, PAIR)
    assert [lane.leftovers() for lane in lanes] == [[], []]


def test_a_row_whose_samples_do_not_stand_stops_looking_ahead(vllm_config: Any) -> None:
    each = request(policy="always", experts=(1,), run_ahead="off", max_tokens=20)
    _, lanes = drive(vllm_config, (2, 1), 400, [each])
    assert lanes[0].ahead <= 4
    _, lanes = drive(vllm_config, (2, 1), 400, [request(policy="never", max_tokens=20)])
    assert lanes[0].ahead >= 19


PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def lane(vllm_config: Any) -> TokenWorkerLane:
    sizes = {"vocab_size": PAIR.vocab_size, "max_model_len": PAIR.max_model_len}
    made = TokenWorkerLane(0, "base", config=vllm_config, blocks=400, depth=2, **sizes)
    made.apply(LaneWork(add=[LaneRequest("a", PROMPT, [], SamplingSpec(temperature=0.0), final=0)]))
    return made


def finish(step: Future[LaneReport]) -> list[tuple[int, int]]:
    assert isinstance(step, Launched)
    step.finish()
    return [(sample.position, sample.token) for sample in step.result().samples]


def extend(lane: TokenWorkerLane, keep: int, tokens: list[int]) -> None:
    lane.apply(LaneWork(extend=[Extension("a", keep, tokens, keep + len(tokens))]))


def after(*tokens: int) -> int:
    return next_token(0, [*PROMPT, *tokens], PAIR.vocab_size)


def test_a_guess_that_holds_is_the_answer(lane: TokenWorkerLane) -> None:
    first, second = lane.start(), lane.start()
    assert not lane.has_work()
    token = after()
    assert finish(first) == [(5, token)]
    extend(lane, 0, [token])
    third = lane.start()
    assert finish(second) == [(6, after(token))]
    extend(lane, 1, [after(token)])
    assert finish(third) == [(7, after(token, after(token)))]


def test_a_guess_that_does_not_hold_is_written_over(lane: TokenWorkerLane) -> None:
    first, second = lane.start(), lane.start()
    finish(first)
    other = (after() + 1) % PAIR.vocab_size
    extend(lane, 0, [other])
    third = lane.start()
    assert finish(second) == []
    assert finish(third) == [(6, after(other))]


def test_a_guess_that_nobody_confirms_in_time_is_computed_again(lane: TokenWorkerLane) -> None:
    first, second = lane.start(), lane.start()
    finish(first)
    assert finish(second) == []
    assert not lane.has_work()
    extend(lane, 0, [after()])
    assert finish(lane.start()) == [(6, after(after()))]


def test_a_cut_while_a_sample_is_under_way(lane: TokenWorkerLane) -> None:
    first = lane.start()
    finish(first)
    extend(lane, 0, [7, 8, 9])
    drafted = lane.start()
    extend(lane, 1, [2])
    again = lane.start()
    assert finish(drafted) == []
    assert finish(again) == [(7, after(7, 2))]


def test_a_row_that_is_dropped_while_it_looks_ahead(lane: TokenWorkerLane) -> None:
    first, second = lane.start(), lane.start()
    finish(first)
    lane.apply(LaneWork(remove=["a"]))
    other = LaneRequest("a", [9, 9], [], SamplingSpec(temperature=0.0), final=0)
    lane.apply(LaneWork(add=[other]))
    third = lane.start()
    assert finish(second) == []
    assert finish(third) == [(2, next_token(0, [9, 9], PAIR.vocab_size))]

"""One vLLM lane, driven by hand: a program of its own, since what vLLM sets in a process stays set.

    python -m tests.oracle.one_lane CHECKPOINT v1|v2

Prints one JSON object, which tests/oracle/test_one_lane.py looks at.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from llguidance import LLMatcher

from engine.config import LaneConfig
from engine.grammar.checker import Templates
from engine.grammar.forms import grammar_of
from engine.grammar.worker import parser_limits, tokenizer_of
from engine.lanes.interface import Extension, LaneRequest, LaneWork, Sample
from engine.loop import StepLoop
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.types import GenerationRequest, SamplingSpec, StructuredOutputs
from engine.vllm_hooks.options import engine_arguments, prepare_environment

SAMPLING = SamplingSpec(temperature=0.0, logprobs=3)
PROMPT = [(7 * number) % 500 + 1 for number in range(28)]
DRAFTS = [(11 * number) % 500 + 1 for number in range(60)]
"""With the prompt these fill two blocks of 32 tokens, and part of a third."""


def main() -> None:
    """Run all scenes on one lane."""
    options = LaneConfig(
        model=sys.argv[1],
        kv_cache_memory_bytes=64 << 20,
        vllm={"dtype": "float32", "max_model_len": 192},
    )
    model_runner = sys.argv[2]
    prepare_environment((options,), model_runner)
    logging.disable()
    from engine.vllm_hooks.hashes import PromptHashes
    from engine.vllm_hooks.lane import VllmLane

    arguments = engine_arguments(
        options,
        label="base",
        max_num_seqs=4,
        vocab_size=512,
        gate_path=None,
        gate_in_head=False,
        model_runner=model_runner,
    )
    templates = Templates()
    lane = VllmLane("base", arguments, eos_token_ids=[0], hashes=PromptHashes(), templates=templates)
    if model_runner == "v2":
        warm_up(lane)
    found = {"drafts": drafts(lane), "texts": texts(lane), "masks": masks(lane, templates)}
    json.dump(found, sys.stdout)
    lane.shutdown()


def warm_up(lane: Any) -> None:
    """vLLM's own steps, which nobody has scheduled, as on a GPU before the first request."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    worker = lane._worker
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)


def added(request_id: str, written: list[int], final: int) -> LaneRequest:
    """A request for PROMPT, some of whose tokens may be drafts."""
    return LaneRequest(request_id, PROMPT, written, SAMPLING, final)


def run(lane: Any, work: LaneWork) -> dict[str, Sample]:
    """Apply, and step until nothing is left to compute: the last sample of each request."""
    lane.apply(work)
    samples = {}
    while lane.has_work():
        for sample in lane.start().result().samples:
            samples[sample.request_id] = sample
    return samples


def seen(sample: Sample) -> list[float]:
    """What a sample tells of the text it follows."""
    assert sample.logprobs is not None
    return sample.logprobs.logprobs


def drafts(lane: Any) -> dict[str, Any]:
    """A row comes (back) with drafts that are another request's text, and is cut."""
    first = run(lane, LaneWork(add=[added("first", DRAFTS, len(DRAFTS))]))["first"]
    run(lane, LaneWork(add=[added("drafting", DRAFTS, 0)]))
    tables = lane._scheduler.kv_cache_manager
    blocks = {name: tables.get_block_ids(name)[0] for name in ("first", "drafting")}
    run(lane, LaneWork(extend=[Extension("drafting", 4, [499, 498], 6)]))
    again = run(lane, LaneWork(add=[added("again", DRAFTS, len(DRAFTS))]))["again"]
    run(lane, LaneWork(remove=["first", "drafting", "again"]))
    return {"first": seen(first), "again": seen(again), "blocks": blocks}


def texts(lane: Any) -> list[int]:
    """How many whole texts travelled to the worker with each step; rows sit steps out."""
    counts = []
    schedule = lane._scheduler.schedule

    def counting(*arguments: Any) -> Any:
        output = schedule(*arguments)
        counts.append(len(output.scheduled_cached_reqs.all_token_ids))
        return output

    lane._scheduler.schedule = counting
    run(lane, LaneWork(add=[added("sits", [], 0)]))
    for number in range(3):
        run(lane, LaneWork(add=[added(f"other-{number}", [], 0)]))
        run(lane, LaneWork(extend=[Extension("sits", number, [5], number + 1)]))
    lane._scheduler.schedule = schedule
    run(lane, LaneWork(remove=["sits", "other-0", "other-1", "other-2"]))
    return counts


class Slow:
    """A form of which every mask takes some processor time."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)

    def deep_copy(self) -> Slow:
        return Slow(self._matcher.deep_copy())

    def compute_bitmask(self) -> bytes:
        begin = time.thread_time()
        while time.thread_time() - begin < 0.06:
            pass
        return bytes(self._matcher.compute_bitmask())


def masks(lane: Any, templates: Templates) -> dict[str, Any]:
    """One request's masks take longer than its share, some tokens after its beginning; another one goes on."""
    scheduler = Scheduler(
        lanes=1,
        max_num_seqs=4,
        max_model_len=192,
        eos_token_ids=[0],
        strategy=Strategies(1, has_gate=False, policy="never", threshold=0.5),
        reject_reason=lane.refusal,
    )
    loop = StepLoop(scheduler, [lane], "lockstep")
    setup = lane.form_setup()
    form = StructuredOutputs(regex="[ab]{100}")
    matcher = LLMatcher(tokenizer_of(setup), grammar_of(form), log_level=0, limits=parser_limits())
    templates.hold("slow", Slow(matcher))
    free = SamplingSpec(temperature=0.0, max_tokens=30, ignore_eos=True)
    scheduler.add(GenerationRequest("slow", PROMPT, SamplingSpec(max_tokens=100, structured_outputs=form)))
    scheduler.add(GenerationRequest("other", PROMPT, free))
    while loop.step():
        pass
    scheduler.add(GenerationRequest("alone", PROMPT, free))
    while loop.step():
        pass
    answers: dict[str, Any] = {}
    for delta in scheduler.take_deltas():
        code = None if delta.code is None else delta.code.value
        answers[delta.request_id] = [delta.tokens, delta.finish_reason, delta.error, code, delta.refused]
    return {**answers, "leftovers": lane.leftovers()}


if __name__ == "__main__":
    main()

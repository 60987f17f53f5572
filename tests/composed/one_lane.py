"""vLLM lanes of composed checkpoints, driven by hand: a program of its own, as in tests/oracle/one_lane.py.

    python -m tests.composed.one_lane FILL FOLDER ...

Prints one JSON object: for each folder what tests/composed/test_lane.py looks at. KV caches are filled with FILL first.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from typing import Any

from engine.config import LaneConfig
from engine.lanes.interface import Extension, LaneRequest, LaneWork, Sample
from engine.types import SamplingSpec
from engine.vllm_hooks.options import engine_arguments, prepare_environment
from tests.oracle.one_lane import run

SAMPLING = SamplingSpec(temperature=0.0, logprobs=3)
WRITTEN = 24
"""Tokens of each answer."""
BATCH = 32
BLOCKS = 40
"""Of 32 tokens: too few for all prompts at once, so that rows are preempted."""
DRAFTS = [(11 * number) % 500 + 1 for number in range(40)]
INSTEAD = [499, 498, 77]
KEPT = 9


def prompts() -> list[list[int]]:
    """20 prompts of 5 to 90 tokens, some with a beginning in common."""
    draw = random.Random(5)
    shared = [draw.randrange(1, 512) for _ in range(40)]
    found = [[draw.randrange(1, 512) for _ in range(draw.randrange(5, 90))] for _ in range(14)]
    return found + [shared + [draw.randrange(1, 512) for _ in range(draw.randrange(1, 30))] for _ in range(6)]


def main() -> None:
    """All scenes on a lane of each folder, one after the other."""
    fill, folders = float(sys.argv[1]), sys.argv[2:]
    options = [
        LaneConfig(
            model=folder,
            vllm={
                "dtype": "float32",
                "max_model_len": 192,
                "max_num_batched_tokens": 48,
                "num_gpu_blocks_override": BLOCKS,
            },
            kv_cache_memory_bytes=256 << 20,
        )
        for folder in folders
    ]
    prepare_environment(tuple(options))
    logging.disable()
    from engine.vllm_hooks.hashes import PromptHashes
    from engine.vllm_hooks.lane import VllmLane

    results = {}
    for folder, option in zip(folders, options, strict=True):
        arguments = engine_arguments(
            option, label="base", max_num_seqs=BATCH, vocab_size=512, gate_path=None, gate_in_head=False
        )
        lane = VllmLane("base", arguments, eos_token_ids=[0], hashes=PromptHashes())
        results[folder] = scenes(lane, fill)
        lane.shutdown()
    json.dump(results, sys.stdout)


def scenes(lane: Any, fill: float) -> dict[str, Any]:
    """Everything that is looked at, on one lane."""
    caches = lane._core.model_executor.driver_worker.worker.model_runner.kv_caches
    for cache in caches:
        cache.fill_(fill)
    asked = prompts()
    together = generate(lane, asked, "together")
    return {
        "caches": len(caches),
        "together": together[0],
        "logprobs": together[1],
        "preemptions": lane.stats().preemptions,
        # Now the prefix cache knows them.
        "again": generate(lane, asked, "again")[0],
        "alone": [generate(lane, [prompt], f"alone-{n}")[0][0] for n, prompt in enumerate(asked[:4])],
        "cut": cut(lane, asked[0]),
        "leftovers": lane.leftovers(),
    }


def generate(lane: Any, asked: list[list[int]], tag: str) -> tuple[list[list[int]], list[float]]:
    """Answers to all prompts at once, and the logprobs of the first one's tokens."""
    names = {f"{tag}-{number}": number for number in range(len(asked))}
    written: list[list[int]] = [[] for _ in asked]
    logprobs: list[float] = []
    work = LaneWork(add=[LaneRequest(name, asked[number], [], SAMPLING, 0) for name, number in names.items()])
    while True:
        lane.apply(work)
        if not lane.has_work():
            break
        work = LaneWork()
        for sample in lane.start().result().samples:
            number = names[sample.request_id]
            written[number].append(sample.token)
            if number == 0:
                logprobs.append(sample.logprobs.logprobs[0])
            if len(written[number]) < WRITTEN:
                have = len(written[number])
                work.extend.append(Extension(sample.request_id, have - 1, [sample.token], have))
            else:
                work.remove.append(sample.request_id)
    lane.flush()
    return written, logprobs


def cut(lane: Any, prompt: list[int]) -> dict[str, Any]:
    """A row of drafts is cut and goes on with other tokens."""
    whole = run(lane, LaneWork(add=[LaneRequest("cut", prompt, DRAFTS, SAMPLING, 0)]))["cut"]
    after = run(lane, LaneWork(extend=[Extension("cut", KEPT, INSTEAD, KEPT)]))["cut"]
    lane.apply(LaneWork(remove=["cut"]))
    lane.flush()
    return {"whole": top(whole), "after": top(after)}


def top(sample: Sample) -> dict[str, Any]:
    """The most probable tokens."""
    assert sample.logprobs is not None
    return {"ids": sample.logprobs.token_ids[1:], "logprobs": sample.logprobs.logprobs[1:]}


if __name__ == "__main__":
    main()

"""What can be said of a configuration without loading weights; for ``collm check``."""

from __future__ import annotations

from collections.abc import Iterator

from engine.checkpoints import Checkpoint
from engine.config import EngineConfig, LaneConfig
from engine.vllm_hooks.load import make_plan
from engine.vllm_hooks.options import CPU_KV_CACHE_BYTES, prepare_environment

_MIB = 1 << 20


def report(config: EngineConfig) -> Iterator[str]:
    """Lines about members, vocabulary, ends of text and gate, if the pair fits.

    Raises:
        ConfigError, GateError: as at start, in the same words.
    """
    prepare_environment(config.lanes, config.scheduler.model_runner)
    plan = make_plan(config)
    adapters = {each.number: each.adapter for each in plan.adapters}
    for number, (name, lane) in enumerate(zip(config.lane_names, config.lanes, strict=True)):
        host = config.hosts[number]
        if host == number:
            yield _member(name, lane)
        if (adapter := adapters.get(number)) is not None:
            where = "" if host == number else f" of {config.lane_names[host]}'s weights, in its steps"
            yield (
                f"{name}: {adapter.directory}: LoRA adapter{where}; "
                f"rank {adapter.rank} on {', '.join(adapter.layers)}; {adapter.size / _MIB:,.1f} MiB of weights"
            )
    if plan.vocabularies == "same":
        yield f"vocabulary: one; prompts are made of the ids from 0 to {plan.vocab_size - 1}"
    else:
        yield "vocabularies: each member has its own, so that prompts are text or messages"
    yield from plan.notes(config.lane_names)
    if plan.gate is None:
        yield "gate: none; policies that need none are served, such as confidence"
    else:
        yield f"gate: {plan.gate.source}, policy {plan.gate.policy}, threshold {plan.gate.threshold:g}"
        if (hindsight := plan.gate.hindsight) is not None:
            yield f"regret: after {hindsight.ahead} tokens; threshold {hindsight.threshold:g} was chosen in training"


def _member(name: str, lane: LaneConfig) -> str:
    checkpoint = Checkpoint.find(lane.model, lane.vllm)
    kind = checkpoint.config.get("model_type", "unknown")
    size = sum(file.stat().st_size for file in checkpoint.directory.glob("*.safetensors"))
    weights = f"{size / _MIB:,.0f} MiB of weights" if size else "weights still to be fetched"
    kv_bytes = lane.kv_cache_memory_bytes
    if kv_bytes is not None:
        memory = f"{kv_bytes / _MIB:,.0f} MiB of KV cache"
    else:
        memory = f"KV cache: {CPU_KV_CACHE_BYTES / _MIB:,.0f} MiB on a CPU, on a GPU what vLLM's share leaves"
    return (
        f"{name}: {lane.model}: {kind}, {len(checkpoint.vocabulary)} tokens, {checkpoint.rows} outputs, "
        f"LM head reads {checkpoint.head_width}; {weights}, {memory}"
    )

"""vLLM as a back end; see :mod:`engine.lanes.backend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.checkpoints import Checkpoint
from engine.config import EngineConfig
from engine.grammar.checker import Templates
from engine.lanes.backend import Loaded
from engine.lanes.shelf import Shelf
from engine.vllm_hooks.options import prepare_environment

if TYPE_CHECKING:
    from engine.vllm_hooks.load import Plan
    from engine.vllm_hooks.shared_shelf import SharedShelf


def load(
    config: EngineConfig,
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[], None],
    on_failure: Callable[[str], None],
    templates: Templates | None,
    shelf: Shelf,
) -> Loaded:
    """One vLLM engine per lane.

    Raises:
        ConfigError, GateError: what does not fit; see :func:`engine.vllm_hooks.load.make_plan`.
    """
    log = prepare_environment(config.lanes, config.scheduler.model_runner)
    if log is not None:
        on_progress(f"vLLM logs to {log}")
    on_progress("checking checkpoints and gate")
    from engine.vllm_hooks.load import load_lanes, make_plan, versions_in_use

    plan = make_plan(config)
    for line in plan.notes(config.lane_names):
        on_progress(line)
    on_progress("importing vLLM")
    obstacle, shared = plan.blend_obstacle, None
    if obstacle is None and config.has_workers and config.blend_obstacle is None:
        try:
            shared = _shared_shelf(config, plan)
        except OSError as error:
            obstacle = f"lanes in worker processes share their distributions in memory: {error}"
    try:
        lanes = load_lanes(
            config,
            plan,
            on_progress=on_progress,
            on_ready=on_ready,
            on_failure=on_failure,
            templates=templates,
            shelf=shared or shelf,
        )
    finally:
        if shared is not None:
            shared.unlink()
    return Loaded(
        lanes,
        plan.vocab_size,
        plan.eos_token_ids,
        plan.gate,
        obstacle,
        versions=versions_in_use(),
        vocabularies=plan.vocabularies,
        spoken=plan.spoken,
        shelf=shared,
    )


def _shared_shelf(config: EngineConfig, plan: Plan) -> SharedShelf:
    from engine.vllm_hooks.shared_shelf import SharedShelf

    rows = [Checkpoint.find(lane.model, lane.vllm).rows for lane in config.lanes]
    return SharedShelf.create(
        lanes=len(config.all_hosts),
        requests=config.scheduler.max_num_seqs,
        vocab=max(rows),
        gate=len(config.experts),
    )

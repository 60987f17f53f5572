"""What of a lane can be cut, and how lanes in one process stay apart. No engine, no GPU: vLLM's own objects."""

from __future__ import annotations

import gc
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import LaneConfig
from engine.errors import ConfigError
from engine.types import MOST_DRAFTS
from engine.vllm_hooks.load import _among_visible
from engine.vllm_hooks.options import engine_arguments, prepare_environment

prepare_environment((LaneConfig(model="none"),))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.distributed import parallel_state
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.worker import workspace

    from engine.vllm_hooks import isolation
    from engine.vllm_hooks.state import keep_windows_for_cuts, what_cannot_be_cut

_ATTENTION: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**_ATTENTION)
WINDOW = SlidingWindowSpec(**_ATTENTION, sliding_window=16)
MAMBA = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))


@pytest.mark.parametrize(
    ("specs", "kind"), [((FULL,), None), ((FULL, WINDOW), None), ((MAMBA,), "Mamba"), ((FULL, MAMBA), "Mamba")]
)
def test_a_recurrent_state_cannot_be_cut(specs: tuple[Any, ...], kind: str | None) -> None:
    groups = [KVCacheGroupSpec([f"layer{number}"], spec) for number, spec in enumerate(specs)]
    assert what_cannot_be_cut(KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)) == kind


def test_windows_keep_what_the_longest_cut_may_bring_back() -> None:
    managers = [
        SimpleNamespace(kv_cache_spec=WINDOW, extra_retained_tokens=0),
        SimpleNamespace(kv_cache_spec=FULL, extra_retained_tokens=0),
    ]
    keep_windows_for_cuts(SimpleNamespace(single_type_managers=managers))
    assert [manager.extra_retained_tokens > MOST_DRAFTS for manager in managers] == [True, False]


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_manager", None)


@pytest.mark.usefixtures("managers")
def test_each_lane_has_its_own_workspace() -> None:
    lanes = []
    for _ in range(2):
        workspace.init_workspace_manager(torch.device("cpu"))
        lanes.append(isolation.OwnWorkspace())
    made = [weakref.ref(lane._manager) for lane in lanes]
    gc.collect()
    assert all(reference() is not None for reference in made), "captured graphs hold addresses in it"
    for lane, reference in zip(lanes, made, strict=True):
        lane.use()
        assert workspace.current_workspace_manager() is reference()


def _wrapper(entries: dict[str, str]) -> Any:
    wrapper: Any = CUDAGraphWrapper.__new__(CUDAGraphWrapper)
    wrapper.concrete_cudagraph_entries = entries
    CUDAGraphWrapper._all_instances.add(wrapper)
    return wrapper


def test_another_lanes_graphs_outlive_a_trial_capture() -> None:
    first = _wrapper({"batch of 1": "graph"})
    with isolation.graphs_kept():
        CUDAGraphWrapper.clear_all_graphs()
        assert first.concrete_cudagraph_entries == {}
    assert first.concrete_cudagraph_entries == {"batch of 1": "graph"}


def test_a_mixture_of_experts_after_a_dense_model_gets_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(parallel_state, "_EP", None)
    monkeypatch.setattr(
        parallel_state, "get_world_group", lambda: SimpleNamespace(world_size=1, local_rank=0, device_group=None)
    )
    monkeypatch.setattr(torch.distributed, "get_backend", lambda _: "gloo")

    def init(*args: Any, **kwargs: Any) -> str:
        made.append((args, kwargs))
        return "group"

    isolation.ensure_expert_group(False, init)
    assert parallel_state._EP is None
    isolation.ensure_expert_group(True, init)
    isolation.ensure_expert_group(True, init)
    assert parallel_state._EP == "group"
    assert made == [(([[0]], 0, "gloo"), {"group_name": "ep"})]


def test_devices_count_among_the_visible_ones() -> None:
    assert _among_visible((1,), None) == ["1"]
    assert _among_visible((1, 0), "2,GPU-ab") == ["GPU-ab", "2"]
    with pytest.raises(ConfigError, match=r"devices: 2 is not among the 2 of CUDA_VISIBLE_DEVICES=2,3"):
        _among_visible((2,), "2,3")


@pytest.mark.parametrize(
    "option",
    [
        "data_parallel_size",
        "decode_context_parallel_size",
        "device_ids",
        "diffusion_config",
        "ec_transfer_config",
        "enable_dbo",
        "enable_lora",
        "enable_prompt_embeds",
        "enable_sleep_mode",
        "kv_offloading_size",
        "kv_transfer_config",
        "pipeline_parallel_size",
        "speculative_config",
        "watermark_config",
    ],
)
def test_options_that_a_lane_cannot_take(option: str) -> None:
    lane = LaneConfig(model="none", vllm={option: 1})
    with pytest.raises(ConfigError, match=rf"^base\.vllm\.{option}: cannot be set \("):
        engine_arguments(lane, label="base", max_num_seqs=4, vocab_size=8, gate_path=None, gate_in_head=False)

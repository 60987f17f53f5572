"""What ``engine.vllm_hooks`` relies on inside vLLM. A new version that moves any of it fails here, by name."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import timeit
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.config import EngineConfig, LaneConfig
from engine.errors import ConfigError
from engine.vllm_hooks.options import engine_arguments, prepare_environment
from tests.oracle import pairs

prepare_environment((LaneConfig(model="none"),))

with warnings.catch_warnings():
    # vLLM and torch warn of their own affairs while they are imported.
    warnings.simplefilter("ignore")
    import vllm
    from vllm import ir
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker import workspace
    from vllm.v1.worker.gpu import async_utils, input_batch
    from vllm.v1.worker.gpu import model_runner as model_runner_v2
    from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
    from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
    from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from engine.vllm_hooks import runner
    from engine.vllm_hooks.scores import gather_logprobs


if current_platform.is_cpu():
    from engine.vllm_hooks import kernels_cpu

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="kernels are chosen by hand on CPUs only")


def test_version() -> None:
    assert vllm.__version__.startswith("0.32."), "read the notes in engine/vllm_hooks before changing this"


def test_nothing_remote_unless_asked_for() -> None:
    """Neither by our arguments nor by vLLM's defaults."""
    arguments = engine_arguments(
        LaneConfig(model=str(pairs.DEMO / "base")),
        label="base",
        max_num_seqs=4,
        vocab_size=1024,
        gate_path=None,
        gate_in_head=False,
    )
    made = EngineArgs(**arguments)
    assert made.trust_remote_code is False
    assert made.enable_prompt_embeds is False
    assert made.allowed_local_media_path == ""


def test_edits_come_after_the_batch_is_complete_and_before_its_metadata() -> None:
    source = inspect.getsource(GPUModelRunner._update_states)
    order = [
        source.index(piece)
        for piece in ("self.input_batch.add_request(request)", "self.input_batch.condense()", "refresh_metadata()")
    ]
    assert order == sorted(order)
    refresh = inspect.getsource(InputBatch.refresh_metadata)
    assert refresh.index("update_state") < refresh.rindex("_make_sampling_metadata")


def test_runner_truncates_what_the_scheduler_did_not_accept() -> None:
    source = inspect.getsource(GPUModelRunner._update_states)
    assert "num_output_tokens < len(req_state.output_token_ids)" in source


def test_compute_logits_is_called_once_for_the_sampled_rows() -> None:
    source = inspect.getsource(GPUModelRunner.execute_model)
    assert "sample_hidden_states = hidden_states[logits_indices]" in source
    assert "self.model.compute_logits(sample_hidden_states)" in source
    assert "compute_logits" not in inspect.getsource(GPUModelRunner.sample_tokens)


def test_running_requests_without_new_tokens_are_skipped() -> None:
    source = inspect.getsource(Scheduler.schedule)
    assert "if num_new_tokens == 0:" in source
    assert "self._preempt_request(" in source


def test_where_memory_is_short_the_order_of_admission_decides() -> None:
    """A lane's requests have their number as vLLM's priority, and a lane knows when they did not get the memory."""
    source = inspect.getsource(Scheduler.schedule)
    assert "self.running,\n                            key=lambda r: (r.priority, r.arrival_time)," in source, (
        "who is preempted"
    )
    assert "if not preempted_reqs and self._pause_state" in source, "not looked at after a preemption"
    queue = create_request_queue(SchedulingPolicy("priority"))
    params = SamplingParams(temperature=0.0)
    for number in (7, 3, 5):
        queue.add_request(Request(str(number), [1], params, None, priority=number))
    assert queue.peek_request().priority == 3
    queue.prepend_request(Request("4", [1], params, None, priority=4))
    assert [queue.pop_request().priority for _ in range(4)] == [3, 4, 5, 7]


def test_prefix_cache_is_read_and_written_where_it_is_bounded() -> None:
    """Drafts are kept out of the prefix cache by wrapping these two calls of the coordinator."""
    read = inspect.getsource(KVCacheManager.get_computed_blocks)
    assert (
        "self.coordinator.find_longest_cache_hit(\n                request.block_hashes, max_cache_hit_length" in read
    )
    wrote = inspect.getsource(KVCacheManager.allocate_slots)
    assert "self.coordinator.cache_blocks(request, num_tokens_to_cache)" in wrote
    assert "self.kv_cache_manager.get_computed_blocks(" in inspect.getsource(Scheduler), (
        "the scheduler looks the cache up through its manager"
    )
    assert "self.hash_block_size = hash_block_size" in inspect.getsource(Scheduler.__init__)


def test_what_appending_an_output_token_is_made_of() -> None:
    """A lane does the same, but hashes only when a block has become full."""
    source = inspect.getsource(Request.append_output_token_ids)
    lines = [line.strip() for line in source.splitlines() if "self." in line]
    assert lines == [
        "self._output_token_ids.append(token_ids)",
        "self._all_token_ids.append(token_ids)",
        "self._output_token_ids.extend(token_ids)",
        "self._all_token_ids.extend(token_ids)",
        "self.update_block_hashes()",
    ]


def test_a_new_request_asks_for_its_prompts_hashes_first() -> None:
    """Lanes share these; at that moment the request has no output."""
    source = inspect.getsource(Request.__init__)
    order = [
        source.index(piece)
        for piece in (
            "self.prompt_token_ids = prompt_token_ids",
            "self.block_hashes: list[BlockHash] = []",
            "self.update_block_hashes()",
        )
    ]
    assert order == sorted(order)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (2, 3, 128), (5, 100), (3, 7)])
def test_normalisation_as_a_lane_dispatches_it_is_vllm_s_native_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Whatever the processor: the compiled kernel where it rounds as torch does, else vLLM's own."""
    torch.manual_seed(len(shape))
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    weight = torch.rand(shape[-1], dtype=dtype)
    # The native one rounds once more, to the weight's type before it multiplies.
    tolerance = {"rtol": max(2e-6, 2 * torch.finfo(dtype).eps), "atol": 1e-6}
    native = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-6)
    natives = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-6)
    with ir.ops.rms_norm.set_priority([kernels_cpu.PROVIDER, "native"]):
        torch.testing.assert_close(
            ir.ops.rms_norm.dispatch(x, weight, 1e-6).impl_fn(x, weight, 1e-6), native, **tolerance
        )
    with ir.ops.fused_add_rms_norm.set_priority([kernels_cpu.PROVIDER, "native"]):
        fused = ir.ops.fused_add_rms_norm.dispatch(x, residual, weight, 1e-6).impl_fn
        ours = fused(x.clone(), residual.clone(), weight, 1e-6)
    torch.testing.assert_close(ours[0], natives[0], **tolerance)
    assert torch.equal(ours[1], natives[1])


@on_cpu
def test_compiled_normalisation_serves_common_widths_in_float32() -> None:
    assert [width for width in (128, 576, 2048, 4096, 8192) if not kernels_cpu.is_exact(torch.float32, width)] == []


@on_cpu
def test_a_kernel_that_truncates_or_refuses_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's do in bfloat16 on processors without AVX-512, and with rows that do not fill their vectors."""

    def truncated(x: torch.Tensor) -> torch.Tensor:
        return (x.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)

    def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        rows = x.float()
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon) * weight.float()

    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("Expected hidden_size % VEC_ELEM_NUM == 0")

    def exact_with(rms_norm: object, fused: object) -> bool:
        monkeypatch.setattr(kernels_cpu, "rms_norm", rms_norm)
        monkeypatch.setattr(kernels_cpu, "fused_add_rms_norm", fused)
        return kernels_cpu.is_exact.__wrapped__(torch.bfloat16, 64)

    def rounding(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return norm(x, weight, epsilon).bfloat16()

    def rounding_sum(
        x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rounding(x + y, weight, epsilon), x + y

    assert exact_with(rounding, rounding_sum)
    assert not exact_with(lambda x, weight, epsilon: truncated(norm(x, weight, epsilon)), rounding_sum)
    assert not exact_with(
        rounding, lambda x, y, weight, epsilon: (rounding(x + y, weight, epsilon), truncated(x.float() + y.float()))
    )
    assert not exact_with(refuse, rounding_sum)


@on_cpu
def test_rows_that_the_compiled_normalisation_cannot_take_are_left_to_vllm() -> None:
    x, weight = torch.randn(4, 64), torch.ones(64)
    takes = ir.ops.rms_norm.impls[kernels_cpu.PROVIDER].supports_args
    assert takes(x, weight, 1e-6)
    assert not takes(x, weight, 1e-6, 32)
    assert not takes(x, None, 1e-6)
    assert not takes(x, weight.bfloat16(), 1e-6)
    assert not takes(torch.randn(4, 128)[:, :64], weight, 1e-6)


@on_cpu
def test_compiled_normalisation_is_for_eager_lanes_and_those_who_choose_nothing() -> None:
    def priority(**options: object) -> object:
        lane = LaneConfig(model=str(pairs.DEMO / "base"), vllm=options)
        arguments = engine_arguments(
            lane, label="base", max_num_seqs=4, vocab_size=1024, gate_path=None, gate_in_head=False
        )
        return EngineArgs(**arguments).create_engine_config().kernel_config.ir_op_priority.rms_norm

    assert priority() == ["collm_cpu", "native"]
    assert priority(ir_op_priority={"rms_norm": ["native"]}) == ["native"]
    assert priority(kernel_config={"ir_op_priority": {"rms_norm": ["native"]}}) == ["native"]
    assert priority(enforce_eager=False) == ["native"]


def test_a_step_goes_through_what_the_worker_wraps() -> None:
    step = inspect.getsource(GPUModelRunner.execute_model)
    assert "self._prepare_inputs(scheduler_output, num_scheduled_tokens_np)" in step
    assert step.index("self._prepare_inputs(") < step.index("self._model_forward(") < step.index("compute_logits(")
    assert "self._sample(logits, spec_decode_metadata)" in inspect.getsource(GPUModelRunner.sample_tokens)
    assert "self.topk_topp_sampler(" in inspect.getsource(Sampler.sample)


def test_hidden_states_of_all_computed_tokens_are_kept_until_sampling() -> None:
    assert "hidden_states" in ExecuteModelState._fields
    assert "self.execute_model_state = None" in inspect.getsource(GPUModelRunner.sample_tokens)


def test_sampling_metadata_is_what_asked_positions_need() -> None:
    assert {field.name for field in dataclasses.fields(SamplingMetadata)} == {
        "temperature", "all_greedy", "all_random", "top_p", "top_k", "generators", "max_num_logprobs", "no_penalties",
        "prompt_token_ids", "frequency_penalties", "presence_penalties", "repetition_penalties", "output_token_ids",
        "allowed_token_ids_mask", "bad_words_token_ids", "logitsprocs", "logprob_token_ids", "spec_token_ids",
        "thinking_budget_state_holder",
    }  # fmt: skip


def test_logprobs_are_gathered_by_an_attribute_of_the_sampler() -> None:
    assert "self.gather_logprobs(" in inspect.getsource(Sampler.forward)
    assert "self.sampler.gather_logprobs(" in inspect.getsource(GPUModelRunner._get_prompt_logprobs_dict)
    assert "self.sampler = Sampler(" in inspect.getsource(GPUModelRunner.__init__), "before the model is loaded"


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("count", [0, 3])
def test_gathered_logprobs_are_vllm_s(rows: int, count: int) -> None:
    torch.manual_seed(rows)
    logprobs = torch.randn(rows, 300).log_softmax(-1)
    # Some tie, and some are impossible.
    logprobs[:, 100:120] = logprobs[:, 99:100]
    logprobs[:, 120:140] = float("-inf")
    tokens = torch.randint(90, 150, (rows,))
    with torch.compiler.set_stance("force_eager"):
        theirs = Sampler.gather_logprobs(logprobs.clone(), count, tokens)
    ours = gather_logprobs(logprobs, count, tokens)
    for mine, its in zip(ours[:3], theirs[:3], strict=True):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)


def test_messages_take_and_carry_an_attribute() -> None:
    scheduled = SchedulerOutput.make_empty()
    scheduled.collm_edits = {"a": 1}
    assert pickle.loads(pickle.dumps(scheduled)).collm_edits == {"a": 1}
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    output.collm_readings = [1.0]
    assert pickle.loads(pickle.dumps(output)).collm_readings == [1.0]


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            Scheduler,
            [
                "schedule",
                "add_request",
                "finish_requests",
                "_preempt_request",
                "get_kv_cache_usage",
                "_update_after_schedule",
            ],
        ),
        (Request, ["append_output_token_ids", "num_output_tokens", "num_tokens", "take_prefill_stats"]),
        (Executor, ["execute_model", "sample_tokens", "register_failure_callback", "get_class"]),
        (Worker, ["load_model", "execute_model", "sample_tokens"]),
        (InputBatch, ["refresh_metadata", "add_request", "condense"]),
        (LogprobsLists, ["logprob_token_ids", "logprobs", "sampled_token_ranks"]),
    ],
)
def test_names_exist(owner: type, names: list[str]) -> None:
    assert [name for name in names if not hasattr(owner, name)] == []


def test_bad_words_are_taken_as_token_ids() -> None:
    params = SamplingParams()
    params._bad_words_token_ids = [[1, 2]]
    assert params.bad_words_token_ids == [[1, 2]]
    assert "sampling_params.bad_words_token_ids" in inspect.getsource(InputBatch.add_request)


def test_request_carries_what_the_scheduler_touches() -> None:
    source = inspect.getsource(Request.__init__)
    for name in (
        "self._output_token_ids",
        "self._all_token_ids",
        "self.block_hashes",
        "self.num_in_flight_tokens",
        "self.num_computed_tokens",
        "self.prefill_stats",
    ):
        assert name in source


def test_what_lanes_in_one_process_are_kept_apart_for() -> None:
    """When one of these falls, ``engine.vllm_hooks.isolation`` has something to give up."""
    profiling = inspect.getsource(GPUModelRunner.profile_cudagraph_memory)
    assert "CUDAGraphWrapper.clear_all_graphs()" in profiling, "clears the graphs of the whole process"
    assert "_manager = WorkspaceManager(" in inspect.getsource(workspace.init_workspace_manager)
    assert "is_moe" in inspect.getsource(parallel_state.initialize_model_parallel)
    assert "current_workspace_manager" in inspect.getsource(workspace.lock_workspace)


def test_windows_free_blocks_by_the_computed_length_less_what_is_retained() -> None:
    source = inspect.getsource(SlidingWindowManager.get_num_skipped_tokens)
    assert "num_computed_tokens - self.sliding_window + 1 - self.extra_retained_tokens" in source


def test_a_row_that_looks_ahead_gets_its_input_from_the_device() -> None:
    prepare = inspect.getsource(GPUModelRunner._prepare_input_ids)
    assert "src=self.input_batch.prev_sampled_token_ids[" in prepare
    assert "prev_req_id_to_index.get(req_id, -1)" in inspect.getsource(GPUModelRunner._compute_prev_positions)
    sample = inspect.getsource(GPUModelRunner.sample_tokens)
    assert ") = self._bookkeeping_sync(" in sample
    assert sample.index("self._sample(") < sample.index("self._bookkeeping_sync(")
    assert "sampled_token_ids=valid_sampled_token_ids" in sample
    assert "self.prepare_inputs_event.synchronize()" in inspect.getsource(GPUModelRunner.synchronize_input_prep)
    assert "+ request.num_output_placeholders" in inspect.getsource(Scheduler.schedule)
    assert "self.num_output_placeholders = 0" in inspect.getsource(Request.__init__)


def test_a_returning_row_costs_no_time_per_token_of_its_context() -> None:
    """What putting a row of 8,192 tokens back into the batch takes beyond one of 8 tokens: 10 us at most."""

    def batch_of(length: int) -> Callable[[], None]:
        batch = InputBatch(
            max_num_reqs=4,
            max_model_len=8448,
            max_num_batched_tokens=8448,
            device=torch.device("cpu"),
            vocab_size=512,
            block_sizes=[32],
            max_num_blocks_per_req=[264],
        )
        state = CachedRequestState(
            req_id="a",
            prompt_token_ids=np.asarray(range(length), dtype=np.int64),
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0),
            generator=None,
            block_ids=([0],),
            num_computed_tokens=0,
            output_token_ids=[],
        )

        def come_back() -> None:
            batch.add_request(state)
            batch.remove_request("a")
            batch.condense()
            batch.refresh_metadata()

        come_back()
        return come_back

    def seconds(length: int) -> float:
        return min(timeit.repeat(batch_of(length), number=20, repeat=20)) / 20

    assert seconds(8192) - seconds(8) < 10e-6


def test_a_returning_row_copies_its_prompt() -> None:
    """An array is copied in microseconds, a list of 8,192 ids is not."""
    source = inspect.getsource(InputBatch.add_request)
    assert "self.token_ids_cpu[req_index, :num_prompt_tokens] = request.prompt_token_ids" in source
    row = np.empty(8192, dtype=np.int32)
    given = list(range(8192))
    as_list = min(timeit.repeat(lambda: row.__setitem__(slice(None), given), number=20, repeat=5))
    array = np.asarray(given, dtype=np.int64)
    as_array = min(timeit.repeat(lambda: row.__setitem__(slice(None), array), number=20, repeat=5))
    assert as_array * 5 < as_list


def test_the_v2_runner_reads_a_text_up_to_its_prefill_length_and_samples_where_it_has_computed_as_much() -> None:
    source = inspect.getsource(input_batch)
    prefill, combine, sampled = (
        source[source.index(f"def {kernel}") :]
        for kernel in ("_prepare_prefill_inputs_kernel", "_combine_sampled", "_get_num_sampled_and_rejected_kernel")
    )
    assert "if num_computed >= prefill_len:\n        # Not prefill.\n        return" in prefill
    assert "if seq_len <= prefill_len:\n        # Handling prefill tokens. No sampled or draft tokens." in combine
    assert "is_chunked_prefilling = seq_len < prefill_len" in sampled


def test_edits_on_the_v2_runner_come_before_the_sampler_counts_tokens() -> None:
    kind = model_runner_v2.GPUModelRunner
    execute = inspect.getsource(kind.execute_model)
    order = [
        execute.index(f"self.{call}(")
        for call in ("finish_requests", "add_requests", "update_requests", "gather_batch_req_state", "prepare_inputs")
    ]
    assert order == sorted(order)
    assert execute.index("self.step_timing.forward_start()") < execute.index("self.model(**model_inputs)")
    add = inspect.getsource(kind.add_requests)
    assert add.index("self.req_states.apply_staged_writes()") < add.index("self.sampler.apply_staged_writes()")
    assert "self._new_penalties_reqs" in inspect.getsource(PenaltiesState.apply_staged_writes)
    # Rows that come back bring all their tokens, as new ones do.
    schedule = inspect.getsource(Scheduler.schedule)
    assert "scheduled_new_reqs.extend(scheduled_resumed_reqs)" in schedule
    assert "finished_req_ids.union(preempted_req_ids)" in inspect.getsource(kind.finish_requests)


def test_the_v2_runner_samples_where_the_lanes_worker_stands_between() -> None:
    sample = inspect.getsource(model_runner_v2.GPUModelRunner.sample)
    assert "logits = self.model.compute_logits(sample_hidden_states)" in sample
    assert "self.sampler(logits, input_batch)" in sample
    assert "self.sample(\n            hidden_states, input_batch, grammar_output\n        )" in inspect.getsource(
        model_runner_v2.GPUModelRunner.sample_tokens
    )
    assert list(inspect.signature(SamplerV2._sample_random).parameters)[1:] == [
        "processed_logits",
        "expanded_idx_mapping",
        "idx_mapping_np",
        "pos",
        "top_k",
        "top_p",
        "use_fused_sampler",
    ]
    assert "return self.model_runner_output" in inspect.getsource(async_utils.AsyncOutput.get_output)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="GPU builds of vLLM bring Triton")
def test_the_v2_runner_is_refused_without_triton() -> None:
    """vLLM's build for CPUs has none of its own."""
    config = EngineConfig.model_validate({"base": {"model": "none"}, "scheduler": {"model_runner": "v2"}})
    with pytest.raises(ConfigError, match=r'^scheduler\.model_runner: "v2" needs Triton'):
        runner.check_triton(config)


def test_what_the_v2_runners_tables_have_room_for() -> None:
    assert runner.excess(SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0))) is None
    found = runner.excess(SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)))
    assert found is not None
    assert found.startswith("logit_bias: 1025 are more than the 1024")

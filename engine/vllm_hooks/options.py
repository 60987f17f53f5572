"""A lane's configuration as vLLM's engine arguments, and the environment that vLLM reads."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import LaneConfig, RecordConfig
from engine.errors import ConfigError
from engine.vllm_hooks.memory import UTILIZATION
from engine.vllm_hooks.wire import SETTINGS_KEY

if TYPE_CHECKING:
    from engine.vllm_hooks.shared_shelf import Layout

CPU_KV_CACHE_BYTES = 1 << 30
CPU_BLOCK_SIZE = 32
"""CPU attention wants a multiple of 32; small blocks waste least on the many short rows of an expert."""

MOST_PLACES = 2048
"""Of rows in a lane that computes for guests; the least number of tokens in a step that vLLM sets by itself."""

LARGE_BYTES = 64 << 20
"""Weights from which on a step on two threads is faster than on one. Below, waking the second one costs more."""

_FIXED = {
    "scheduler_cls": "the lane's own",
    "scheduling_policy": "the lane's own: where memory is short, requests that were admitted first go on",
    "worker_cls": "the lane's own",
    "async_scheduling": "must stay off: a sampled token is only a proposal",
    "distributed_executor_backend": "set as 'executor', beside the table 'vllm'",
    "speculative_config": "a lane's tokens are decided outside it",
    **dict.fromkeys(
        ("kv_transfer_config", "kv_offloading_size", "kv_events_config", "ec_transfer_config"),
        "nobody would take in what the transfer reports",
    ),
    **dict.fromkeys(("watermark_config", "diffusion_config"), "needs another model runner than a lane's"),
    "device_ids": "set as 'devices', beside the table 'vllm'",
    "enable_sleep_mode": "its allocator serves one engine per process",
    "weight_transfer_config": "a lane's weights stay",
    **dict.fromkeys(
        ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_target_modules", "default_mm_loras"),
        "set as 'adapter', beside the table 'vllm'",
    ),
    "enable_prompt_embeds": "prompts are token ids",
    "enable_batch_sharded_sampling": "a lane's worker reads whole rows",
    **dict.fromkeys(
        (
            "pipeline_parallel_size",
            "data_parallel_size",
            "prefill_context_parallel_size",
            "decode_context_parallel_size",
            "enable_dbo",
            "enable_elastic_ep",
        ),
        "a lane is one replica, in shards of 'tensor_parallel_size'",
    ),
}


def prepare_environment(lanes: tuple[LaneConfig, ...], model_runner: str = "v1") -> Path | None:
    """Set what vLLM reads from the environment. Call before anything of vLLM is imported; keeps what a user set.

    One model runner for all lanes, executors in the process where asked for, no usage report.

    Args:
        model_runner: see SchedulerConfig.

    Returns:
        The file that vLLM logs to, on a GPU; None where only its errors show.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if model_runner == "v2" else "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # FlashInfer compiles its sampler while vLLM starts, which takes nvcc; a row with a seed bypasses it anyway.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # The other one calls the model runner directly, past the lane's worker.
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1",
        # When a step is lost is the step loop's decision; to vLLM a late answer is the end of the engine.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(7 * 24 * 3600),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    # Every start would print some dozens of lines that concern nobody who serves a pair; errors still show.
    log = None
    if not is_cpu_build() and not {"VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"} & os.environ.keys():
        log = _log_to_file()
        defaults["VLLM_LOGGING_LEVEL"] = "INFO"
    else:
        defaults["VLLM_LOGGING_LEVEL"] = "ERROR"
    if is_cpu_build():
        # On a GPU vLLM sees to the few threads that it needs, unless it finds a number.
        defaults |= _threads(len(cores), lanes)
    if all(lane.executor != "ray" for lane in lanes):
        # Everything runs on this machine: torch's gloo must not listen where the machine's name leads.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    shards = max(lane.tensor_parallel_size for lane in lanes)
    if shards > 1:
        # Only CPU workers in processes of their own read this: each gets its share of the cores.
        share = max(1, len(cores) // shards)
        groups = [cores[shard * share : (shard + 1) * share] or cores for shard in range(shards)]
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # What is logged before vLLM has set up its own logging.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    return log


def _log_to_file() -> Path:
    """Let vLLM, in worker processes too, write its log to a file, and only errors to the terminal.

    Memory reports, sizes of CUDA graphs, choices of kernels: what one wants to read when a GPU behaves oddly.
    """
    folder = Path(tempfile.mkdtemp(prefix="collm-vllm-"))
    log = folder / "vllm.log"
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"}},
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "plain"},
            "terminal": {"class": "logging.StreamHandler", "level": "ERROR", "formatter": "plain"},
        },
        "loggers": {"vllm": {"handlers": ["file", "terminal"], "level": "INFO", "propagate": False}},
    }
    (folder / "logging.json").write_text(json.dumps(settings), encoding="utf-8")
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
    return log


def is_cpu_build() -> bool:
    """Whether the installed vLLM is built for CPUs; torch may be the ordinary build all the same."""
    try:
        return importlib.metadata.version("vllm").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True  # vllm-cpu


def _threads(cores: int, lanes: tuple[LaneConfig, ...]) -> dict[str, str]:
    """OpenMP's settings for lanes on a CPU.

    One core stays free for whoever talks to the engine, as in vLLM's own worker processes: the threads of a step wait
    for each other by spinning, so one that lacks a core holds up all. On two cores that would be half of the machine.
    There a large model takes both, and its threads give way after some microseconds of waiting.
    """
    if cores == 2 and any(is_large(lane.model) for lane in lanes):
        return {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"}
    return {"OMP_NUM_THREADS": str(max(1, cores - 1))}


def is_large(model: str) -> bool:
    """Whether a step of a model, a folder or a name on a hub, is faster on two threads than on one."""
    directory = Path(model)
    if not directory.is_dir():
        return True  # from a hub
    folders = [directory]
    composition = directory / "composition.json"
    if composition.is_file():
        # A composed checkpoint holds little itself; what it computes is in its members. What is damaged there is said
        # by who loads it: nothing that imports torch may be asked before the threads are set.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            fields = json.loads(composition.read_text(encoding="utf-8"))
            folders += [directory / member["path"] for member in (fields["anchor"], *fields["augmenting"])]
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors")) >= LARGE_BYTES


def _places(max_num_seqs: int, guests: int, most: int) -> int:
    """Rows that a lane holds at once: a request waits in its place in each lane that has it, guests' among them.

    With fewer places parked rows give theirs up, and are computed anew; vLLM wants no more than tokens in a step.
    """
    return max(max_num_seqs, min(max_num_seqs * (1 + guests), most))


def check_names(options: Iterable[str], known: Sequence[str], label: str) -> None:
    """Refuse options that vLLM does not have, or that a lane sets itself.

    Args:
        known: names of the fields of vLLM's ``EngineArgs``.
        label: where the table ``vllm`` stands, for error messages.

    Raises:
        ConfigError: naming the option.
    """
    for option in options:
        if option in _FIXED:
            raise ConfigError(f"{label}.vllm.{option}: cannot be set ({_FIXED[option]})")
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{label}.vllm.{option}: vLLM has no such engine option{hint}")


def _check_ray(label: str) -> None:
    """Refuse what would fail later, or would be computed past the lane's worker.

    Raises:
        ConfigError: Ray cannot place the lane's workers.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    where = f"{label}.executor: 'ray'"
    if not current_platform.ray_device_key:
        device = current_platform.device_type
        raise ConfigError(f"{where} is for devices that Ray counts, and vLLM on this {device} has none: use 'mp'")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{where} needs the package ray: make install-ray, or pip install 'collm[ray]'")
    if not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        raise ConfigError(
            f"{where} needs VLLM_USE_RAY_V2_EXECUTOR_BACKEND=1: the older executor calls the model runner directly"
        )


def engine_arguments(
    config: LaneConfig,
    *,
    label: str,
    max_num_seqs: int,
    vocab_size: int,
    masked: Sequence[tuple[int, int]] = (),
    gate_path: str | None,
    gate_in_head: bool,
    memory_share: float | None = None,
    lora: dict[str, Any] | None = None,
    guests: int = 0,
    record: RecordConfig | None = None,
    shelf: Layout | None = None,
    model_runner: str = "v1",
) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``EngineArgs``.

    Args:
        label: where the lane stands in the configuration, for error messages: "base" or "experts.NAME".
        max_num_seqs: rows that the lane must be able to hold at once.
        vocab_size: ids of prompts are in [0, vocab_size).
        masked: ranges [begin, end) of the model's outputs that are never sampled.
        gate_in_head: the last row of the LM head is the gate.
        memory_share: of the device, for a GPU lane that does not state one; None is vLLM's default.
        lora: arguments for its adapters, from :func:`engine.vllm_hooks.guest.lora_arguments`.
        guests: adapters whose rows it computes beside its own.
        record: where the worker writes what it reads of scored positions.
        shelf: where its workers find the one that all lanes share, if they are processes of their own.
        model_runner: as for :func:`prepare_environment`.

    Raises:
        ConfigError: an option that vLLM does not have, or that the lane sets itself.
    """
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from engine.vllm_hooks.scheduler import LaneScheduler

    check_names(config.vllm, [field.name for field in dataclasses.fields(EngineArgs)], label)
    if config.executor == "ray":
        _check_ray(label)
    is_cpu = current_platform.is_cpu()
    worker = "worker_cpu.CpuLaneWorker" if is_cpu else "worker_gpu.GpuLaneWorker"
    worker += model_runner.upper()
    arguments: dict[str, Any] = {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_seqs": _places(max_num_seqs, guests, config.vllm.get("max_num_batched_tokens", MOST_PLACES)),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if is_cpu:
        # torch.compile gains some percent, but needs a C++ compiler where it serves, and three times as long to start.
        arguments |= {"block_size": CPU_BLOCK_SIZE, "enforce_eager": True}
    if memory_share is not None:
        arguments[UTILIZATION] = memory_share
    arguments |= config.vllm
    if is_cpu and arguments["enforce_eager"] and "kernel_config" not in arguments:
        # vLLM takes the choice in one of two places, and refuses both.
        from engine.vllm_hooks.kernels_cpu import COMPILED_OPS, PROVIDER

        arguments.setdefault("ir_op_priority", {op: [PROVIDER, "native"] for op in COMPILED_OPS})
    grammars = config.structured_output
    if isinstance(grammars, dict):
        # With "auto" a lane takes whatever back end suits the first grammar that it sees, for all that follow: two
        # lanes could come to differ in what they accept, and a later grammar in what of it is heeded.
        try:
            arguments["structured_outputs_config"] = StructuredOutputsConfig(**grammars)
        except (TypeError, ValueError) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(f"{label}.vllm.structured_outputs_config: {problem}") from error
    kv_bytes = config.kv_cache_memory_bytes
    if kv_bytes is None and is_cpu:
        kv_bytes = CPU_KV_CACHE_BYTES
    arguments |= lora or {}
    arguments |= {
        "model": config.model,
        "tensor_parallel_size": config.tensor_parallel_size,
        # The class, not its name: on CPU vLLM turns the name into worker processes.
        "distributed_executor_backend": UniProcExecutor if config.executor == "uni" else config.executor,
        "kv_cache_memory_bytes": kv_bytes,
        "async_scheduling": False,
        "scheduler_cls": LaneScheduler,
        # By the order of admission to the pair, which all lanes know, and not of arrival at this lane.
        "scheduling_policy": "priority",
        "worker_cls": f"engine.vllm_hooks.{worker}",
        "additional_config": {
            **arguments.get("additional_config", {}),
            SETTINGS_KEY: {
                "vocab_size": vocab_size,
                "masked": [list(of) for of in masked],
                "gate_path": gate_path,
                "gate_in_head": gate_in_head,
                "record": None if record is None else record.model_dump(),
                "shelf": None if shelf is None else list(shelf),
                "model_runner": model_runner,
            },
        },
    }
    return arguments

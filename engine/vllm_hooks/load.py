"""From a configuration to lanes that fit each other. What does not fit is refused before any weight is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from engine.config import EngineConfig, LaneConfig
from engine.errors import ConfigError, GateError
from engine.gate import GateArtifact
from engine.types import GateInfo, PolicyName

_NAMED_ENTRIES = 5
"""How many differing vocabulary entries an error names."""


@dataclass(frozen=True)
class Checkpoint:
    """What is read of a checkpoint before it is loaded.

    Attributes:
        directory: with config.json and the tokenizer's files.
        rows: outputs of the LM head.
        vocabulary: token -> id, added tokens included.
    """

    directory: Path
    rows: int
    hidden_size: int
    vocabulary: dict[str, int]
    eos_token_ids: list[int]


@dataclass(frozen=True)
class Plan:
    """How the lanes are to be started.

    Attributes:
        vocab_size: real vocabulary, which all lanes share.
        gate_in_head: the base is in the reference format: its LM head has one more row, which is theta.
    """

    vocab_size: int
    eos_token_ids: list[int]
    gate: GateInfo | None
    gate_in_head: bool


def make_plan(config: EngineConfig) -> Plan:
    """Read all checkpoints and the gate, and check that they fit.

    Raises:
        ConfigError: a checkpoint is missing or unreadable, or vocabularies differ; names the field and the entries.
        GateError: the gate does not fit, or is damaged.
    """
    labels = ["base", *(f"experts.{expert.name}" for expert in config.experts)]
    checkpoints = [_read_checkpoint(label, lane) for label, lane in zip(labels, config.lanes, strict=True)]
    base, experts = checkpoints[0], checkpoints[1:]
    for label, expert in zip(labels[1:], experts, strict=True):
        _check_same_vocabulary(label, base, expert)
    vocab_size = min([checkpoint.rows for checkpoint in checkpoints], default=base.rows)
    highest = max(base.vocabulary.values(), default=0)
    if highest >= vocab_size:
        raise ConfigError(f"the tokenizer has id {highest}, but a model has only {vocab_size} outputs")
    gate_in_head = False
    gate: GateInfo | None = None
    if config.gate.path is not None:
        artifact = GateArtifact.load(config.gate.path)
        names = [expert.name for expert in config.experts]
        if list(artifact.experts) != names:
            raise GateError(
                f"gate.path: the gate is for the experts {list(artifact.experts)}, the configuration has {names}"
            )
        if artifact.hidden_size != base.hidden_size:
            raise GateError(
                f"gate.path: the gate is for hidden size {artifact.hidden_size}, the base has {base.hidden_size}"
            )
        artifact.check_fits(base.directory, [expert.directory for expert in experts])
        if artifact.default_policy not in get_args(PolicyName):
            raise GateError(f"gate.path: unknown default policy {artifact.default_policy!r}")
        gate = GateInfo(
            config.gate.path,
            config.gate.policy or cast("PolicyName", artifact.default_policy),
            artifact.default_threshold if config.gate.threshold is None else config.gate.threshold,
        )
    elif len(experts) == 1 and base.rows == experts[0].rows + 1:
        gate_in_head = True
        gate = GateInfo(
            "lm_head",
            config.gate.policy or "threshold",
            0.5 if config.gate.threshold is None else config.gate.threshold,
        )
    return Plan(vocab_size, base.eos_token_ids, gate, gate_in_head)


def load_lanes(
    config: EngineConfig,
    plan: Plan,
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[], None],
    on_failure: Callable[[str], None],
) -> list[Any]:
    """Start one :class:`~engine.vllm_hooks.lane.VllmLane` a model, in lane order.

    Args:
        on_progress: one line at a time.
        on_ready: called from another thread when a lane has work that it had not before.
        on_failure: called from another thread with the lane's name when a worker process of it dies.

    Raises:
        ConfigError: vLLM refuses a lane's options; names the lane.
    """
    from engine.vllm_hooks.hashes import PromptHashes
    from engine.vllm_hooks.lane import VllmLane
    from engine.vllm_hooks.options import engine_arguments
    from engine.vllm_hooks.processor import vector_units

    lanes: list[VllmLane] = []
    hashes = PromptHashes()
    for name, lane in zip(config.lane_names, config.lanes, strict=True):
        is_base = not lanes
        label = "base" if is_base else f"experts.{name}"
        on_progress(f"loading {name}: {lane.model}")
        arguments = engine_arguments(
            lane,
            label=label,
            max_num_seqs=config.scheduler.max_num_seqs,
            vocab_size=plan.vocab_size,
            gate_path=config.gate.path if is_base else None,
            gate_in_head=plan.gate_in_head and is_base,
        )
        try:
            with _visible_devices(lane.devices):
                lanes.append(
                    VllmLane(
                        name,
                        arguments,
                        eos_token_ids=plan.eos_token_ids,
                        hashes=hashes,
                        on_ready=on_ready,
                        on_failure=lambda name=name: on_failure(name),  # type: ignore[misc]
                    )
                )
        except Exception as error:  # of vLLM, torch, safetensors, the platform: all mean the same here
            for started in lanes:
                started.shutdown()
            raise ConfigError(f"{label}: vLLM cannot start {lane.model}: {_one_line(error)}") from error
        if (dtype := lanes[-1].slow_dtype) is not None:
            on_progress(
                f"{name} computes in {dtype}, which this processor ({vector_units()}) does many times slower than"
                f' float32: set {label}.vllm.dtype to "float32" unless memory is short'
            )
    return lanes


@contextmanager
def _visible_devices(devices: tuple[int, ...] | None) -> Iterator[None]:
    """Worker processes inherit the environment: show them only their lane's devices."""
    if devices is None:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:600] + "..."


def _read_checkpoint(label: str, lane: LaneConfig) -> Checkpoint:
    directory = Path(lane.model)
    if not directory.is_dir():
        directory = _from_hub(label, lane.model)
    tokenizer_dir = Path(lane.vllm.get("tokenizer", directory))
    config = _read_json(label, directory / "config.json")
    text_config = config.get("text_config", config)
    try:
        rows, hidden_size = int(text_config["vocab_size"]), int(text_config["hidden_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{label}.model: {directory / 'config.json'} has no usable {error}") from error
    generation = directory / "generation_config.json"
    eos = _read_json(label, generation).get("eos_token_id") if generation.is_file() else None
    if eos is None:
        eos = text_config.get("eos_token_id")
    eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else [int(token) for token in eos]
    return Checkpoint(directory, rows, hidden_size, _read_vocabulary(label, tokenizer_dir), eos_token_ids)


def _read_json(label: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{label}.model: {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{label}.model: {file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{label}.model: {file}: holds no JSON object")
    return content


def _read_vocabulary(label: str, directory: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{label}.model: {directory} has no tokenizer.json (a fast tokenizer is needed)")
    try:
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{label}.model: {file}: {_one_line(error)}") from error


def _from_hub(label: str, name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except HFValidationError as error:
        raise ConfigError(f"{label}.model: {name}: no such folder") from error
    except Exception as error:  # network and cache failures of many kinds; all mean the same here
        raise ConfigError(
            f"{label}.model: {name}: no such folder, and not to be had from a model hub ({type(error).__name__})"
        ) from error


def _check_same_vocabulary(label: str, base: Checkpoint, expert: Checkpoint) -> None:
    if base.vocabulary == expert.vocabulary:
        return
    differing = [
        f"{token!r} is {_id(base.vocabulary, token)} in the base and {_id(expert.vocabulary, token)} in the expert"
        for token in sorted(base.vocabulary.keys() | expert.vocabulary.keys())
        if base.vocabulary.get(token) != expert.vocabulary.get(token)
    ]
    named = "; ".join(differing[:_NAMED_ENTRIES])
    more = f"; and {len(differing) - _NAMED_ENTRIES} more" if len(differing) > _NAMED_ENTRIES else ""
    raise ConfigError(
        f"{label}.model: base and expert must share a vocabulary; {len(differing)} entries differ: {named}{more}"
    )


def _id(vocabulary: dict[str, int], token: str) -> str:
    return str(vocabulary.get(token, "absent"))


def versions_in_use() -> dict[str, str]:
    """Versions of what computes, for /version and for reports."""
    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": str(torch.__version__)}

"""Training the base, with or without theta, on gold completions; the experts' scores come from the cache.

One process trains the whole base, in float32. Several, or one in a reduced precision, train a sharded one.

Shapes: B examples, T tokens, V vocabulary, N completion tokens of a batch, d hidden size, K experts.
"""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from engine.gate import gate_logits
from training.checkpoints import empty_causal, forward, load_causal
from training.data import TokenExample
from training.errors import SettingsError
from training.fit import Group, Plan, fit
from training.gate_only import Gate
from training.losses import Loss, Tokens
from training.packing import check_apart, packed, rows_of
from training.processes import ALONE, Processes, start_mesh
from training.scoring import PairScores, gold_logp, padded
from training.settings import JointSettings, LoraSettings
from training.sharded import gathered, shard

_R = TypeVar("_R")


@dataclass(frozen=True)
class JointFit:
    """How base and theta are fitted. ``bias``: whether the gate's bias learns too."""

    settings: JointSettings
    plan: Plan
    positive_weight: float
    bias: bool
    seed: int
    vocabulary: int


def fit_joint(
    source: Path,
    examples: Sequence[TokenExample],
    scores: PairScores,
    start: Gate,
    loss: Loss,
    fitting: JointFit,
    folder: Path,
    label: str,
    device: torch.device,
    processes: Processes = ALONE,
) -> tuple[PreTrainedModel, Gate] | None:
    """Train a base and a gate from ``start``; the base has any adapters merged.

    Args:
        source: the base's checkpoint.
        processes: those that train together, all with the same arguments.

    Returns:
        None in all processes but the main one.

    Raises:
        DivergedError: the loss or a gradient is not finite.
        SettingsError: LoRA without the package peft, or with targets that the base lacks; packing that it cannot do.
    """
    settings = fitting.settings
    sharding = processes.count > 1 or settings.dtype != "float32"
    model = (_sharded if sharding else _whole)(source, settings, fitting.seed, device, processes)
    model.train()
    inner = _inner(model)
    if settings.gradient_checkpointing:
        # Not reentrant: gradients reach the gate's input too, and adapters on frozen weights learn.
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expert_logp_NK, label_N, aligned_NK = scores.expert_logp_NK, scores.weak_labels(), scores.aligned_NK
    theta_KD = torch.nn.Parameter(start.theta_KD.clone().to(device))
    bias_K = torch.nn.Parameter(start.bias_K.clone().to(device), requires_grad=fitting.bias)
    lengths = [len(example.prompt) + len(example.completion) for example in examples]
    if settings.packing:
        check_apart(inner, fitting.vocabulary, device)
    per_epoch = -(-len(examples) // settings.batch_size)

    def parts(step: int) -> Iterator[torch.Tensor]:
        epoch, within = divmod(step, per_epoch)
        order = random.Random(fitting.seed * 1_000_003 + epoch).sample(range(len(examples)), len(examples))
        numbers = order[within * settings.batch_size : (within + 1) * settings.batch_size]
        if settings.packing:
            batch = rows_of(numbers, lengths)
        else:
            # Examples of about the same length together: less padding; the sum is the same.
            batch = [[number] for number in sorted(numbers, key=lengths.__getitem__)]
        total = sum(len(examples[number].completion) for number in numbers)
        # Dropout, if there is any, depends on the step and the process alone, so that a resumed run repeats it.
        torch.manual_seed(fitting.seed * 1_000_003 + step + processes.rank * 1_000_000_007)
        for share in micro_batches(batch, settings.micro_batch_size, processes):
            # Sharded weights are only there where all processes compute: who has no examples left computes for nothing.
            weighed, together = bool(share), share or batch[:1]
            chosen = [number for row in together for number in row]
            positions_BT = None
            if settings.packing:
                tokens_BT, where_BT, positions_BT = packed([[examples[n] for n in row] for row in together])
                positions_BT = positions_BT.to(device)
            else:
                tokens_BT, where_BT = padded([examples[n] for n in chosen])
            tokens_BT, where_BT = tokens_BT.to(device), where_BT.to(device)
            rows = torch.cat([torch.arange(scores.starts[n], scores.starts[n + 1]) for n in chosen])
            hidden_BTD, logits_BTV = forward(inner, tokens_BT, positions_BT)
            tokens = Tokens(
                gate_NK=gate_logits(hidden_BTD[where_BT], theta_KD, bias_K),
                base_logp_N=gold_logp(logits_BTV, tokens_BT, where_BT, fitting.vocabulary),
                expert_logp_NK=expert_logp_NK[rows].to(device),
                label_N=label_N[rows].to(device),
                aligned_NK=None if aligned_NK is None else aligned_NK[rows].to(device),
            )
            yield loss(tokens, fitting.positive_weight) * (weighed * len(rows) / total)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gate = {"gate.theta": theta_KD} | ({"gate.bias": bias_K} if fitting.bias else {})
    theta_rate = settings.theta_learning_rate or settings.learning_rate
    groups = [
        Group(trained, settings.learning_rate, settings.weight_decay, clip=settings.clip),
        Group(gate, theta_rate, settings.weight_decay),
    ]
    fit(groups, parts, fitting.plan, folder, label, processes=processes)
    if sharding:
        learned = gathered(trained, processes)
        if not processes.main:
            return None
        # A checkpoint of its own, in the host's memory: what is sharded stays so.
        model = _whole(source, settings, fitting.seed, torch.device("cpu"), processes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(learned.pop(name))
    merged: PreTrainedModel = model if settings.lora is None else model.merge_and_unload()
    merged.to(getattr(torch, settings.dtype)).eval().requires_grad_(False)
    return merged, Gate(theta_KD.detach().cpu(), bias_K.detach().cpu())


def micro_batches(rows: Sequence[_R], size: int, processes: Processes) -> list[Sequence[_R]]:
    """This process's part of a batch, in micro-batches of at most ``size``. All processes have as many, some perhaps
    empty ones, and at one time those of about the same length, if the batch is in order of length.
    """
    if processes.count == 1:
        return [rows[at : at + size] for at in range(0, len(rows), size)]
    rounds = -(-len(rows) // (size * processes.count))
    count = rounds * processes.count
    ends = [len(rows) * number // count for number in range(count + 1)]
    every = [rows[start:end] for start, end in itertools.pairwise(ends)]
    return every[processes.rank :: processes.count]


def _whole(source: Path, settings: JointSettings, seed: int, device: torch.device, _: Processes) -> Any:
    """The base as it learns, in float32, on one device."""
    return _learning(load_causal(source, "float32", device), settings, seed)


def _sharded(source: Path, settings: JointSettings, seed: int, device: torch.device, processes: Processes) -> Any:
    """The base as it learns, over all processes. What learns is float32, what is frozen ``settings.dtype``."""
    mesh = start_mesh(device)
    stored = "float32" if settings.lora is None else settings.dtype
    with torch.device("meta"):
        skeleton = _learning(empty_causal(source, stored), settings, seed)
    whole = _learning(load_causal(source, stored), settings, seed) if processes.main else None
    shard(skeleton, whole, _inner, getattr(torch, settings.dtype), device, mesh)
    return skeleton


def _learning(base: PreTrainedModel, settings: JointSettings, seed: int) -> Any:
    torch.manual_seed(seed)
    if settings.lora is None:
        return base.requires_grad_(True)
    return _with_lora(base, settings.lora)


def _inner(model: Any) -> PreTrainedModel:
    """The transformers model in what learns, which may be put around it."""
    inner: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return inner


def _with_lora(model: Any, settings: LoraSettings) -> Any:
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise SettingsError("train.joint.lora: needs the package peft: pip install peft") from error
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise SettingsError(f"train.joint.lora: {str(error).splitlines()[0]}") from error

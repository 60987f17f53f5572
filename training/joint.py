"""Training the base, with or without theta, on gold completions; the experts' scores come from the cache.

Shapes: B examples, T tokens, V vocabulary, N completion tokens of a batch, d hidden size, K experts.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.gate import gate_logits
from training.checkpoints import forward
from training.data import TokenExample
from training.errors import SettingsError
from training.fit import Group, Plan, fit
from training.gate_only import Gate
from training.losses import Loss, Tokens
from training.scoring import PairScores, gold_logp, padded
from training.settings import JointSettings, LoraSettings


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
    base: PreTrainedModel,
    examples: Sequence[TokenExample],
    scores: PairScores,
    start: Gate,
    loss: Loss,
    fitting: JointFit,
    folder: Path,
    label: str,
) -> tuple[PreTrainedModel, Gate]:
    """Train the base and a gate from ``start``. The base is used up; the returned one has any adapters merged.

    Raises:
        DivergedError: the loss or a gradient is not finite.
        SettingsError: LoRA without the package peft, or with targets that the base lacks.
    """
    settings, device = fitting.settings, base.device
    torch.manual_seed(fitting.seed)
    model: Any = base.float()
    if settings.lora is None:
        model.requires_grad_(True)
    else:
        model = _with_lora(model, settings.lora)
    model.train()
    if settings.gradient_checkpointing:
        # Not reentrant: gradients reach the gate's input too, and adapters on frozen weights learn.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expert_logp_NK, label_N, aligned_NK = scores.expert_logp_NK, scores.weak_labels(), scores.aligned_NK
    theta_KD = torch.nn.Parameter(start.theta_KD.clone().to(device))
    bias_K = torch.nn.Parameter(start.bias_K.clone().to(device), requires_grad=fitting.bias)
    per_epoch = -(-len(examples) // settings.batch_size)
    inner = model.get_base_model() if settings.lora is not None else model

    def parts(step: int) -> Iterator[torch.Tensor]:
        epoch, within = divmod(step, per_epoch)
        order = random.Random(fitting.seed * 1_000_003 + epoch).sample(range(len(examples)), len(examples))
        numbers = order[within * settings.batch_size : (within + 1) * settings.batch_size]
        # Examples of about the same length together: less padding; the sum is the same.
        numbers.sort(key=lambda number: len(examples[number].prompt) + len(examples[number].completion))
        total = sum(len(examples[number].completion) for number in numbers)
        # Dropout, if there is any, depends on the step alone, so that a resumed run repeats it.
        torch.manual_seed(fitting.seed * 1_000_003 + step)
        for at in range(0, len(numbers), settings.micro_batch_size):
            chosen = numbers[at : at + settings.micro_batch_size]
            tokens_BT, where_BT = (tensor.to(device) for tensor in padded([examples[n] for n in chosen]))
            rows = torch.cat([torch.arange(scores.starts[n], scores.starts[n + 1]) for n in chosen])
            hidden_BTD, logits_BTV = forward(inner, tokens_BT)
            tokens = Tokens(
                gate_NK=gate_logits(hidden_BTD[where_BT], theta_KD, bias_K),
                base_logp_N=gold_logp(logits_BTV, tokens_BT, where_BT, fitting.vocabulary),
                expert_logp_NK=expert_logp_NK[rows].to(device),
                label_N=label_N[rows].to(device),
                aligned_NK=None if aligned_NK is None else aligned_NK[rows].to(device),
            )
            yield loss(tokens, fitting.positive_weight) * (len(rows) / total)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gate = {"gate.theta": theta_KD} | ({"gate.bias": bias_K} if fitting.bias else {})
    theta_rate = settings.theta_learning_rate or settings.learning_rate
    groups = [
        Group(trained, settings.learning_rate, settings.weight_decay, clip=settings.clip),
        Group(gate, theta_rate, settings.weight_decay),
    ]
    fit(groups, parts, fitting.plan, folder, label)
    merged: PreTrainedModel = model if settings.lora is None else model.merge_and_unload()
    merged.eval().requires_grad_(False)
    return merged, Gate(theta_KD.detach().cpu(), bias_K.detach().cpu())


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

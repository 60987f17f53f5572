"""What learns: a composition's connections, or the control's adapter; the members stay as they are.

Shapes: B examples, T tokens, N completion tokens of a batch.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from engine.composed.artifact import Composition, Connection, Heads, Member
from training.checkpoints import forward
from training.compose.composed import ComposedModel, LearnedConnection, Reads
from training.compose.settings import ComposeSettings, TrainSettings
from training.data import TokenExample
from training.errors import SettingsError
from training.files import read_json, write_json, write_tensors
from training.fit import Group, Plan, fit
from training.scoring import gold_logp, padded

BEST, LOOKS = "best.safetensors", "looks.json"


def planned(settings: ComposeSettings, anchor: Member, augmenting: Sequence[Member]) -> Composition:
    """The composition that the settings ask for, not trained yet.

    Connections that are not given by hand are evenly spaced: the last one reads the augmenting model's last layer, and
    goes into a layer of the anchor that others follow, which can work with what was read.

    Raises:
        SettingsError: heads that do not divide the anchor's hidden size, connections that cannot be made, or more of
            them than have layers of their own.
    """
    connect = settings.connect
    connections = [Connection(c.augmenting, c.layer, c.into) for c in connect.connections]
    if not connections:
        for member in augmenting:
            spaced = [
                Connection(
                    member.name,
                    layer=max(1, number * member.layers // connect.count),
                    into=max(1, number * anchor.layers // (connect.count + 1)),
                )
                for number in range(1, connect.count + 1)
            ]
            if len(set(spaced)) < connect.count:
                raise SettingsError(
                    f"connect.count: of {connect.count} connections some would read and write the same layers, since"
                    f" {member.name!r} has {member.layers} and the anchor {anchor.layers}: take fewer"
                )
            connections += spaced
    heads = connect.heads or int(anchor.identity.architecture["num_attention_heads"])
    size = connect.head_size or anchor.hidden_size // heads
    if connect.head_size is None and anchor.hidden_size % heads:
        raise SettingsError(f"connect.heads: {heads} does not divide the anchor's hidden size, {anchor.hidden_size}")
    form = Heads(heads, connect.kv_heads or heads, size, connect.normalize)
    found = Composition(anchor, tuple(augmenting), tuple(connections), form)
    for field, problem in found.problems():
        raise SettingsError(f"connect.{field}: {problem}")
    return found


def new_model(composition: Composition, anchor: Any, augmenting: Mapping[str, Any], seed: int) -> ComposedModel:
    """A composition with connections that have not learned: it computes what the anchor computes."""
    torch.manual_seed(seed)
    names = [member.name for member in composition.augmenting]
    connections = [
        LearnedConnection(
            composition.heads,
            anchor_size=composition.anchor.hidden_size,
            augmenting_size=composition.member(connection.augmenting).hidden_size,
        ).to(anchor.device)
        for connection in composition.connections
    ]
    reads = [Reads(names.index(c.augmenting), c.layer, c.into) for c in composition.connections]
    return ComposedModel(anchor, [augmenting[name] for name in names], reads, connections)


@dataclass(frozen=True)
class Learning:
    """What is learned from, and how."""

    settings: TrainSettings
    train: Sequence[TokenExample]
    validation: Sequence[TokenExample]
    vocabulary: int
    seed: int


def learn(model: Any, learned: Mapping[str, nn.Parameter], learning: Learning, folder: Path, label: str) -> float:
    """Train the named parameters in place and leave them as they were at the best look; the validation loss there.

    Goes on from what is in ``folder``.

    Raises:
        DivergedError: the loss or a gradient is not finite.
    """
    settings = learning.settings
    per_epoch = -(-len(learning.train) // settings.batch_size)
    steps = per_epoch * settings.epochs

    def parts(step: int) -> Iterator[torch.Tensor]:
        epoch, within = divmod(step, per_epoch)
        order = random.Random(learning.seed * 1_000_003 + epoch).sample(range(len(learning.train)), len(learning.train))
        numbers = order[within * settings.batch_size : (within + 1) * settings.batch_size]
        examples = sorted((learning.train[number] for number in numbers), key=lambda e: len(e.prompt + e.completion))
        total = sum(len(example.completion) for example in examples)
        for at in range(0, len(examples), settings.micro_batch_size):
            yield -_logp(model, examples[at : at + settings.micro_batch_size], learning.vocabulary).sum() / total

    looks = _Looks(model, learned, learning, folder)
    plan = Plan(steps, settings.warm_up, settings.checkpoint_every)
    group = Group(learned, settings.learning_rate, settings.weight_decay, clip=settings.clip)
    fit([group], parts, plan, folder, label, ends=looks.ends)
    looks.ends(steps, last=True)
    looks.restore()
    return looks.best


class _Looks:
    """The validation loss at regular steps, and the parameters where it was least, on disk."""

    def __init__(self, model: Any, learned: Mapping[str, nn.Parameter], learning: Learning, folder: Path) -> None:
        self._model, self._learned, self._learning, self._folder = model, learned, learning, folder
        file = folder / LOOKS
        self._losses: dict[str, float] = read_json(file) if file.exists() else {}

    @property
    def best(self) -> float:
        """The least loss."""
        return min(self._losses.values())

    def ends(self, step: int, last: bool = False) -> bool:
        """Look, if it is time to, and say whether nothing has become better for long."""
        settings = self._learning.settings
        if step % settings.evaluate_every and not last:
            return False
        # After an interruption steps are repeated, and say the same again.
        self._losses = {at: loss for at, loss in self._losses.items() if int(at) < step}
        loss = self._loss()
        if not self._losses or loss < self.best:
            write_tensors(self._folder / BEST, self._learned)
        self._losses[str(step)] = loss
        write_json(self._folder / LOOKS, self._losses)
        since = list(self._losses.values())
        return len(since) - 1 - since.index(min(since)) >= settings.patience

    @torch.no_grad()
    def _loss(self) -> float:
        learning = self._learning
        examples = sorted(learning.validation, key=lambda e: len(e.prompt) + len(e.completion))
        size = learning.settings.micro_batch_size
        found = [
            _logp(self._model, examples[at : at + size], learning.vocabulary) for at in range(0, len(examples), size)
        ]
        return float(-torch.cat(found).mean())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best parameters back."""
        tensors = load_file(str(self._folder / BEST))
        for name, parameter in self._learned.items():
            parameter.copy_(tensors[name])


def _logp(model: Any, examples: Sequence[TokenExample], vocabulary: int) -> torch.Tensor:
    """log P(gold) [N] of the examples' completions."""
    tokens_BT, where_BT = (tensor.to(model.device) for tensor in padded(examples))
    _, logits_BTV = forward(model, tokens_BT)
    return gold_logp(logits_BTV, tokens_BT, where_BT, vocabulary)


def with_adapter(anchor: Any, parameters: int) -> Any:
    """The anchor with a LoRA adapter on all its linear layers, of the rank that comes nearest to so many parameters.

    Raises:
        SettingsError: the package peft is missing.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise SettingsError("evaluate.controls: lora needs the package peft: pip install peft") from error
    head = anchor.get_output_embeddings()
    layers = [m for m in anchor.modules() if isinstance(m, nn.Linear) and m is not head]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    rank = max(1, round(parameters / per_rank))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(anchor, config)

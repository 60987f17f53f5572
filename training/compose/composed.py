"""A composed model in PyTorch, for training and scoring: Hugging Face members, and connections that learn.

The method is CALM's (Bansal et al., "LLM Augmented LLMs", arXiv 2401.02412): the anchor reads the augmenting models'
states of the same positions by cross-attention. What is served is :mod:`engine.composed`; both compute the same.

Shapes: B examples, T tokens, D the anchor's hidden size, A an augmenting model's; H query heads, G key and value heads
and S the size of a head as in ``Heads``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from engine.composed.artifact import EPSILON, TENSORS_FILE, Composition, Heads


class LearnedConnection(nn.Module):
    """One cross-attention from the anchor to an augmenting model.

    With the paper's names: ``project`` is f, ``query``, ``key``, ``value`` and ``output`` are W_Q, W_K, W_V and W_O.
    W_O starts at zero, so that a composition that was not trained is the anchor.

    Args:
        anchor_size: D.
        augmenting_size: A.
        form: H, G and S.
    """

    def __init__(self, form: Heads, *, anchor_size: int, augmenting_size: int) -> None:
        super().__init__()
        self._form = form
        queries, reads = form.heads * form.head_size, form.kv_heads * form.head_size
        self.project = nn.Linear(augmenting_size, anchor_size, bias=False)
        self.query = nn.Linear(anchor_size, queries, bias=False)
        self.key = nn.Linear(anchor_size, reads, bias=False)
        self.value = nn.Linear(anchor_size, reads, bias=False)
        self.output = nn.Linear(queries, anchor_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, anchor_BTD: torch.Tensor, augmenting_BTA: torch.Tensor) -> torch.Tensor:
        """What is added to the anchor's states [B, T, D]: causal attention without positions."""
        if self._form.normalize:
            anchor_BTD, augmenting_BTA = _normalized(anchor_BTD), _normalized(augmenting_BTA)
        projected_BTD = self.project(augmenting_BTA)
        mixed = _attend(self.query(anchor_BTD), self.key(projected_BTD), self.value(projected_BTD), self._form)
        added_BTD: torch.Tensor = self.output(mixed)
        return added_BTD

    def folded(self) -> dict[str, torch.Tensor]:
        """The weights as they are served: the projection is folded into those of keys and values, in float64."""
        project = self.project.weight.detach().double()
        return {
            "query": self.query.weight.detach().float(),
            "key": (self.key.weight.detach().double() @ project).float(),
            "value": (self.value.weight.detach().double() @ project).float(),
            "output": self.output.weight.detach().float(),
        }


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Heads) -> torch.Tensor:
    """Causal attention [B, T, H * S] of such queries to keys and values [B, T, G * S], without positions."""
    mixed_BHTS = F.scaled_dot_product_attention(
        _split(query, form.heads, form),
        _split(key, form.kv_heads, form),
        _split(value, form.kv_heads, form),
        is_causal=True,
        enable_gqa=form.kv_heads != form.heads,
    )
    return mixed_BHTS.transpose(1, 2).flatten(2)


def _split(states: torch.Tensor, count: int, form: Heads) -> torch.Tensor:
    """States by heads [B, count, T, S]."""
    return states.view(*states.shape[:-1], count, form.head_size).transpose(1, 2)


def _normalized(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, (states.shape[-1],), eps=EPSILON)


@dataclass(frozen=True)
class Reads:
    """Where a connection reads and writes: after layer ``layer`` of augmenting model ``member``, after ``into``."""

    member: int
    layer: int
    into: int


class ComposedModel(nn.Module):
    """An anchor that reads its augmenting models through connections. Members are frozen and shared, not copied.

    It takes the place of a Hugging Face model for what training and scoring ask of one.
    """

    def __init__(
        self,
        anchor: PreTrainedModel,
        augmenting: Sequence[PreTrainedModel],
        reads: Sequence[Reads],
        connections: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.anchor = anchor
        self.augmenting = nn.ModuleList(augmenting)
        self.connections = nn.ModuleList(connections)
        self._reads = list(reads)
        self._states: dict[tuple[int, int], torch.Tensor] = {}
        anchor_layers = decoder_layers(anchor)
        for read, connection in zip(self._reads, self.connections, strict=True):
            anchor_layers[read.into - 1].register_forward_hook(self._writer(read, connection))
        for member, model in enumerate(augmenting):
            layers = decoder_layers(model)
            used = {read.layer for read in self._reads if read.member == member}
            for layer in used:
                layers[layer - 1].register_forward_hook(self._reader(member, layer))
            # What stands above the highest layer that is read changes nothing.
            del layers[max(used) :]

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        device: torch.device = self.anchor.device
        return device

    @property
    def config(self) -> Any:
        """The anchor's."""
        return self.anchor.config

    def get_output_embeddings(self) -> Any:
        """The anchor's LM head."""
        return self.anchor.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """Logits [B, T, V] as the anchor gives them; the whole text is computed, there is no KV cache."""
        self._states.clear()
        with torch.no_grad():
            for model in self.augmenting:
                inner: Any = model.base_model
                inner(input_ids=input_ids, use_cache=False)
        return self.anchor(input_ids=input_ids, use_cache=False)

    def _reader(self, member: int, layer: int) -> Any:
        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._states[member, layer] = output[0] if isinstance(output, tuple) else output

        return read

    def _writer(self, read: Reads, connection: nn.Module) -> Any:
        def write(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + connection(hidden, self._states[read.member, read.layer])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return write


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, in whatever attribute the architecture keeps them.

    Raises:
        ValueError: there is no single list of as many modules as the configuration has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has no single list of {count} layers")
    return found[0]


def load_composed(folder: Path, load: Callable[[Path], PreTrainedModel]) -> ComposedModel:
    """A composed checkpoint, frozen.

    Args:
        load: gives a member from its folder.

    Raises:
        CompositionError: it is damaged, or its members are not those that it was made for.
    """
    composition = Composition.load(folder)
    composition.check()
    tensors = load_file(str(folder / TENSORS_FILE))
    names = [member.name for member in composition.augmenting]
    anchor = load(composition.anchor.path)
    connections = [
        ServedConnection(
            composition.heads,
            {part: tensors[f"connections.{number}.{part}.weight"] for part in ("query", "key", "value", "output")},
        )
        for number in range(len(composition.connections))
    ]
    model = ComposedModel(
        anchor,
        [load(member.path) for member in composition.augmenting],
        [Reads(names.index(c.augmenting), c.layer, c.into) for c in composition.connections],
        connections,
    )
    return model.to(device=anchor.device, dtype=anchor.dtype).eval().requires_grad_(False)


class ServedConnection(nn.Module):
    """A connection as it is on disk: the projection is part of the weights of keys and values."""

    def __init__(self, form: Heads, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._form = form
        self.weights = nn.ParameterDict({name: nn.Parameter(weight) for name, weight in weights.items()})

    def forward(self, anchor_BTD: torch.Tensor, augmenting_BTA: torch.Tensor) -> torch.Tensor:
        """What is added to the anchor's states [B, T, D]."""
        if self._form.normalize:
            anchor_BTD, augmenting_BTA = _normalized(anchor_BTD), _normalized(augmenting_BTA)
        query, key, value = (
            F.linear(states, self.weights[name])
            for name, states in (("query", anchor_BTD), ("key", augmenting_BTA), ("value", augmenting_BTA))
        )
        return F.linear(_attend(query, key, value, self._form), self.weights["output"])

    def attention(self, anchor_BTD: torch.Tensor, augmenting_BTA: torch.Tensor) -> torch.Tensor:
        """How much each position reads of each [B, H, T, T]; rows sum to 1."""
        form = self._form
        if form.normalize:
            anchor_BTD, augmenting_BTA = _normalized(anchor_BTD), _normalized(augmenting_BTA)
        query_BHTS = _split(F.linear(anchor_BTD, self.weights["query"]), form.heads, form)
        key_BGTS = _split(F.linear(augmenting_BTA, self.weights["key"]), form.kv_heads, form)
        key_BHTS = key_BGTS.repeat_interleave(form.heads // form.kv_heads, dim=1)
        scores_BHTT = query_BHTS @ key_BHTS.transpose(-1, -2) / form.head_size**0.5
        future_TT = torch.ones_like(scores_BHTT[0, 0], dtype=torch.bool).triu(1)
        weight_BHTT: torch.Tensor = scores_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1)
        return weight_BHTT

"""A composed model as one model of vLLM.

Members are vLLM's own models, built from their checkpoints. A hook on a decoder layer of an augmenting model keeps what
leaves it; a hook on one of the anchor adds what a connection made of it. So any architecture will do whose layers give
their states as vLLM's decoders do: (hidden, residual), of which the sum counts, or one tensor.

Shapes: T tokens, D the anchor's hidden size.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from engine.composed.artifact import CONFIG_FILE, Composition, Connection, Member
from engine.composed.connections import CrossAttention

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
"""The layer's number in the name of a weight."""


class ComposedForCausalLM(nn.Module):
    """See the module. ``vllm_config.model_config.model`` is the folder of the composed checkpoint."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        composition = Composition.load(model_config.model)
        self._composition = composition
        self._states: dict[tuple[str, int], torch.Tensor] = {}
        anchor_config = copy.deepcopy(model_config.hf_config)
        self.anchor = init_vllm_registered_model(
            vllm_config,
            prefix=maybe_prefix(prefix, "anchor"),
            hf_config=anchor_config,
            architectures=_architectures(composition.anchor),
        )
        self.augmenting = nn.ModuleDict(
            {
                member.name: init_vllm_registered_model(
                    vllm_config,
                    prefix=maybe_prefix(prefix, f"augmenting.{member.name}"),
                    hf_config=self._augmenting_config(member, model_config.trust_remote_code),
                    architectures=_architectures(member),
                )
                for member in composition.augmenting
            }
        )
        self.connections = nn.ModuleList(
            CrossAttention(
                composition.heads,
                composition.anchor.hidden_size,
                composition.member(connection.augmenting).hidden_size,
                vllm_config.cache_config,
                maybe_prefix(prefix, f"connections.{number}"),
            )
            for number, connection in enumerate(composition.connections)
        )
        # vLLM's loader gives the weights of all of these to load_weights, after the connections'.
        self.secondary_weights = [
            DefaultModelLoader.Source(str(composition.anchor.path), revision=None, prefix="anchor."),
            *(
                DefaultModelLoader.Source(str(member.path), revision=None, prefix=f"augmenting.{member.name}.")
                for member in composition.augmenting
            ),
        ]
        self._hook()

    def _augmenting_config(self, member: Member, trust_remote_code: bool) -> Any:
        """As the checkpoint's, without the layers that nobody reads and without an LM head of its own."""
        config = AutoConfig.from_pretrained(str(member.path), trust_remote_code=trust_remote_code)
        config.num_hidden_layers = self._composition.layers_of(member.name)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        config.tie_word_embeddings = True
        return config

    def _hook(self) -> None:
        composition = self._composition
        anchor_layers = _decoder_layers(self.anchor, composition.anchor.layers)
        for name, model in self.augmenting.items():
            layers = _decoder_layers(model, composition.layers_of(name))
            for layer in {c.layer for c in composition.connections if c.augmenting == name}:
                layers[layer - 1].register_forward_hook(self._reader(name, layer))
        # A layer's hooks run in the order of their registration: connections into one layer add up.
        for connection, attention in zip(composition.connections, self.connections, strict=True):
            anchor_layers[connection.into - 1].register_forward_hook(self._writer(connection, attention))

    def _reader(self, name: str, layer: int) -> Any:
        def read(module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden, residual = _states(module, output)
            self._states[name, layer] = hidden if residual is None else hidden + residual

        return read

    def _writer(self, connection: Connection, attention: nn.Module) -> Any:
        def write(module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden, residual = _states(module, output)
            anchor_TD = hidden if residual is None else hidden + residual
            hidden = hidden + attention(anchor_TD, self._states[connection.augmenting, connection.layer])
            return (hidden, residual) if isinstance(output, tuple) else hidden

        return write

    def embed_input_ids(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """The anchor's embedding of tokens."""
        embedded: torch.Tensor = self.anchor.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The anchor's last states [T, D]. All members read the same tokens at the same positions."""
        for model in self.augmenting.values():
            model(input_ids, positions)
        hidden_TD: torch.Tensor = self.anchor(input_ids, positions)
        # On a GPU they would hold memory until the next step.
        self._states.clear()
        return hidden_TD

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The anchor's logits."""
        logits: torch.Tensor | None = self.anchor.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Connections from this checkpoint, each member by its own loader; the names of all that were loaded."""
        loaded: set[str] = set()
        for owner, found in itertools.groupby(weights, key=lambda item: self._owner(item[0])):
            names = ((name.removeprefix(owner), tensor) for name, tensor in found)
            if owner == "connections.":
                loaded |= {owner + name for name in self._load_connections(names)}
            elif owner == "anchor.":
                loaded |= {owner + name for name in self.anchor.load_weights(names)}
            else:
                name = owner.removeprefix("augmenting.").removesuffix(".")
                kept = self._computed(names, self._composition.layers_of(name))
                augmenting: Any = self.augmenting[name]
                loaded |= {owner + inner for inner in augmenting.load_weights(kept)}
        return loaded

    def _owner(self, name: str) -> str:
        prefixes = ("connections.", "anchor.", *(f"augmenting.{inner}." for inner in self.augmenting))
        return next(prefix for prefix in prefixes if name.startswith(prefix))

    def _load_connections(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters: dict[str, Any] = dict(self.connections.named_parameters())
        loaded = set()
        for name, tensor in weights:
            # Each takes the shard of this rank.
            parameters[name].weight_loader(parameters[name], tensor)
            loaded.add(name)
        return loaded

    @staticmethod
    def _computed(weights: Iterable[tuple[str, torch.Tensor]], layers: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of an augmenting model without those of layers that are not computed, and of its LM head."""
        for name, tensor in weights:
            found = _LAYER.search(f".{name}")
            if not name.startswith("lm_head.") and (found is None or int(found[1]) < layers):
                yield name, tensor


def _architectures(member: Member) -> list[str]:
    architectures: list[str] = json.loads((member.path / CONFIG_FILE).read_text(encoding="utf-8"))["architectures"]
    return architectures


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} cannot be composed: it has no single list of {count} decoder layers")
    return found[0]


def _states(layer: nn.Module, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What left a decoder layer: hidden states, and the residual that is still to be added."""
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, torch.Tensor) for part in output):
        return output[0], output[1]
    raise TypeError(f"{type(layer).__name__} cannot be composed: it does not give its states as vLLM's decoders do")

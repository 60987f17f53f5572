"""LoRA adapters as peft saves them: what is read of one before anything is loaded, and which cannot be served.

An adapter adds a product of two narrow matrices to some of a model's linear layers (arXiv 2106.09685). What an adapter
may have beyond that changes what other rows of the same batch compute, or is computed by no serving engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.checkpoints import Checkpoint, locate, read_json
from engine.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

LARGEST_RANK = 512
"""The largest that vLLM has room for."""

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_READ_HIDDEN = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "gate_proj", "up_proj", "gate_up_proj")
"""Layers whose input is as wide as the hidden state, in all families that have them."""
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")
"""Ways to initialise an adapter that leave other weights behind in the model than it was made of."""
_UNSERVED = {
    "use_dora": "is a DoRA adapter",
    "modules_to_save": "has whole layers of its own (modules_to_save)",
    "trainable_token_indices": "has embeddings of its own (trainable_token_indices)",
    "lora_bias": "has biases of its own (lora_bias)",
    "layer_replication": "repeats layers (layer_replication)",
    "alora_invocation_tokens": "begins in the middle of a text (alora_invocation_tokens)",
    "target_parameters": "adapts parameters that are no linear layers (target_parameters)",
    "use_qalora": "is a QALoRA adapter",
    "use_bdlora": "is block-diagonal (use_bdlora)",
}
"""Fields of adapter_config.json that must be empty or false, and what it means where one is not."""

MERGE_IT = "merge it into a copy of its model (peft's merge_and_unload) and serve that as 'model'"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder.

    Attributes:
        fields: the content of adapter_config.json.
    """

    directory: Path
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, name: str | Path) -> Adapter:
        """An adapter by folder, or by its name on a hub.

        Raises:
            CheckpointError: nothing is there, it is damaged, or it is of a kind that is not served; names the field.
        """
        directory = locate(name, also=[ADAPTER_WEIGHTS])
        file = directory / ADAPTER_CONFIG
        if not file.is_file():
            raise CheckpointError(f"{directory} has no {ADAPTER_CONFIG}")
        adapter = cls(directory, read_json(file))
        if (problem := adapter._problem()) is not None:
            raise CheckpointError(f"{directory}: {problem}")
        return adapter

    @cached_property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        pattern = self.fields.get("rank_pattern") or {}
        return max([int(self.fields["r"]), *map(int, pattern.values())])

    @cached_property
    def shapes(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(layer, "A" or "B") -> the matrix's shape, by the layers' names in the adapted model.

        Raises:
            CheckpointError: the file cannot be read, or holds anything else.
        """
        file = self.directory / ADAPTER_WEIGHTS
        if not file.is_file():
            raise CheckpointError(f"{self.directory} has no {ADAPTER_WEIGHTS} (other formats are not read)")
        found = {}
        try:
            with safe_open(str(file), "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - no mapping
                    match = _TENSOR.fullmatch(key)
                    if match is None:
                        raise CheckpointError(f"{file}: {key} is no matrix of a LoRA layer; {MERGE_IT}")
                    rows, columns = tensors.get_slice(key).get_shape()
                    found[match["module"], match["side"]] = (rows, columns)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
        return found

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The last names of the layers that it adapts, sorted: ("q_proj", "v_proj")."""
        return tuple(sorted({module.rpartition(".")[2] for module, _ in self.shapes}))

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return (self.directory / ADAPTER_WEIGHTS).stat().st_size

    def misfit(self, model: Checkpoint) -> str | None:
        """Why it cannot be an adapter of this model; None if nothing speaks against it."""
        depth, width = model.depth, model.config.get("hidden_size")
        for (module, side), (_, columns) in self.shapes.items():
            layer = _LAYER.search(f".{module}")
            if layer is not None and depth is not None and int(layer[1]) >= depth:
                return f"adapts layer {layer[1]} of a model with more than the {depth} layers of {model.directory}"
            reads_hidden = side == "A" and module.rpartition(".")[2] in _READ_HIDDEN
            if reads_hidden and isinstance(width, int) and columns != width:
                return f"adapts a model of hidden size {columns}; {model.directory} has {width}"
        return None

    def _problem(self) -> str | None:
        fields = self.fields
        kind = fields.get("peft_type")
        if kind != "LORA":
            return f"{ADAPTER_CONFIG}: peft_type is {kind!r}; LORA is served"
        rank = fields.get("r")
        if not isinstance(rank, int) or rank < 1:
            return f"{ADAPTER_CONFIG}: field r: no rank is found there"
        if self.rank > LARGEST_RANK:
            return f"its rank is {self.rank}; up to {LARGEST_RANK} can be served"
        for field, meaning in _UNSERVED.items():
            if fields.get(field):
                return f"{meaning}; {MERGE_IT}"
        if fields.get("bias", "none") != "none":
            return f"has biases of its own (bias); {MERGE_IT}"
        initialised = fields.get("init_lora_weights", True)
        if isinstance(initialised, str) and initialised.lower().startswith(_CHANGES_WEIGHTS):
            return f"init_lora_weights is {initialised!r}: it fits weights that peft changed as it began; {MERGE_IT}"
        vocabulary = {"lm_head", "embed_tokens", "embed_out", "wte"}.intersection(self.layers)
        if vocabulary:
            return f"adapts the vocabulary's layers ({', '.join(sorted(vocabulary))}); {MERGE_IT}"
        return None


def is_adapter(directory: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()

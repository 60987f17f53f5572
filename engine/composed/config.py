"""What vLLM's options must be for a composed model; looked at before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.config import CompilationMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from engine.composed.artifact import CONFIG_FILE, Composition, Member


class ComposedConfig(VerifyAndUpdateConfig):
    """vLLM calls these two while it makes its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Keep to the shortest context of all members, unless a user sets one.

        Raises:
            CompositionError: the checkpoint is damaged, or its members are not those that it was made for.
            ValueError: a context that is longer than a member's was asked for.
        """
        composition = Composition.load(model_config.model)
        composition.check()
        for member in composition.augmenting:
            longest = member.identity.architecture.get("max_position_embeddings")
            if not isinstance(longest, int) or model_config.max_model_len <= longest:
                continue
            if model_config.original_max_model_len is not None:
                raise ValueError(
                    f"max_model_len: is {model_config.max_model_len}, but the augmenting model {member.name} reads no "
                    f"more than {longest} tokens"
                )
            model_config.max_model_len = longest

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Run eagerly, or in CUDA graphs of whole decoding steps: vLLM compiles one model, not one inside another.

        Raises:
            ValueError: an option that is not supported, by its name.
        """
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError("pipeline_parallel_size: a composed model cannot be split into pipeline stages")
        if vllm_config.lora_config is not None:
            raise ValueError("enable_lora: not for composed models: merge the adapter into a member before composing")
        if vllm_config.model_config.enable_prompt_embeds:
            raise ValueError(
                "enable_prompt_embeds: a composed model reads token ids, which all members embed themselves"
            )
        composition = Composition.load(vllm_config.model_config.model)
        if composition.heads.kv_heads % parallel.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size: {parallel.tensor_parallel_size} does not divide the composition's kv_heads, "
                f"{composition.heads.kv_heads}"
            )
        for member in (composition.anchor, *composition.augmenting):
            _check_quantization(member, composition.anchor)
        vllm_config.compilation_config.mode = CompilationMode.NONE


def _check_quantization(member: Member, anchor: Member) -> None:
    """vLLM has one quantization for a model and all that is inside it."""
    found, wanted = (
        json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8")).get("quantization_config")
        for path in (member.path, anchor.path)
    )
    if found != wanted:
        raise ValueError(f"quantization_config: {member.path} must be quantized as the anchor is, or neither")

"""Makes composed checkpoints known to vLLM; the entry point ``collm_composed`` of group ``vllm.general_plugins``."""

from __future__ import annotations

from engine.composed.artifact import ARCHITECTURE


def register() -> None:
    """Register the model and the checks of its options. vLLM calls this in each of its processes, maybe repeatedly."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from engine.composed.config import ComposedConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: it is imported where it is run, not in every process.
        ModelRegistry.register_model(ARCHITECTURE, "engine.composed.model:ComposedForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ComposedConfig

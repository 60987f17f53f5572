"""Which of vLLM's two model runners computes, and what the V2 runner does not take.

Nothing outside this package knows which one it is: ``worker_v1`` and ``worker_v2`` have what differs in the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

SETTING = "scheduler.model_runner"


def check_config(config: EngineConfig) -> None:
    """Refuse what has not been run on the V2 runner.

    Raises:
        ConfigError: naming the option.
    """
    if config.scheduler.model_runner == "v1":
        return
    labels = ["base", *(f"experts.{expert.name}" for expert in config.experts)]
    for label, lane in zip(labels, config.lanes, strict=True):
        if lane.adapter is not None:
            raise ConfigError(f'{label}.adapter: lanes with adapters need {SETTING} = "v1"')
        if lane.executor == "ray":
            raise ConfigError(f'{label}.executor: "ray" needs {SETTING} = "v1"')
        if lane.vllm.get("logits_processors"):
            raise ConfigError(f'{label}.vllm.logits_processors needs {SETTING} = "v1"')


def check_composed(config: EngineConfig, label: str) -> None:
    """Refuse a composed checkpoint on the V2 runner.

    Raises:
        ConfigError: naming the lane.
    """
    if config.scheduler.model_runner == "v2":
        raise ConfigError(f'{label}.model: composed models need {SETTING} = "v1"')


def check_triton(config: EngineConfig) -> None:
    """Refuse the V2 runner where its kernels cannot run. Imports vLLM.

    Raises:
        ConfigError: there is no Triton for the device.
    """
    if config.scheduler.model_runner == "v1":
        return
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise ConfigError(
            f'{SETTING}: "v2" needs Triton with a back end for this device, which is not installed: leave it at "v1"'
        )


def check_made(config: VllmConfig, wanted: str) -> None:
    """Refuse options of vLLM that bring in another runner than the one that is wanted.

    Raises:
        ConfigError: they do.
    """
    made = "v2" if config.use_v2_model_runner else "v1"
    if made != wanted:
        raise ConfigError(f'these options make vLLM use its model runner {made!r}, and {SETTING} is "{wanted}"')


def check_state(fixed: str | None, wanted: str) -> None:
    """Refuse layers whose state cannot be cut on the V2 runner.

    Args:
        fixed: from :func:`engine.vllm_hooks.state.what_cannot_be_cut`.

    Raises:
        ConfigError: there are some.
    """
    if fixed is not None and wanted == "v2":
        raise ConfigError(f'models with state of kind {fixed} need {SETTING} = "v1"')


def excess(params: SamplingParams) -> str | None:
    """What the V2 runner's tables of a request have no room for; it would raise in the step otherwise."""
    from vllm import envs
    from vllm.v1.worker.gpu.sample import logit_bias

    words = params.bad_words_token_ids or []
    stops = params.all_stop_token_ids if params.min_tokens > 0 else ()
    for name, found, most in (
        ("allowed_token_ids", len(params.allowed_token_ids or ()), logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS),
        ("logit_bias", len(params.logit_bias or ()), logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS),
        ("stop_token_ids with min_tokens", len(stops), logit_bias.MAX_NUM_STOP_TOKEN_IDS),
        ("bad_words", len(words), envs.VLLM_MAX_NUM_BAD_WORDS),
        ("bad_words in tokens", sum(map(len, words)), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS),
    ):
        if found > most:
            return f"{name}: {found} are more than the {most} that the server's model runner takes"
    return None

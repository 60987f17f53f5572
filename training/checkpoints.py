"""Hugging Face checkpoints of any architecture: loading, checking that they fit, and looking at the LM head's input.

Shapes: B examples, T tokens, V vocabulary, d hidden size.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from engine.adapters import Adapter, is_adapter
from engine.checkpoints import TOKENIZER, Checkpoint, copy_companions, locate, make_readable, tokenizer_folder
from engine.compatibility import compatibility
from engine.composed.artifact import is_composed
from engine.errors import CheckpointError
from engine.vocabulary import Member, SharedVocabulary, difference, missing_rows
from training.errors import ModelError
from training.settings import ComputeSettings, Settings

_CPU = torch.device("cpu")


def quiet() -> None:
    """Keep transformers' progress bars and advice off the terminal."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@cache
def folder_of(name: str) -> Path:
    """The folder of a model or an adapter; a name on a hub is fetched, with its weights, once per process.

    Raises:
        CheckpointError: it is neither.
    """
    return locate(name, also=["*.safetensors"])


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer."""
    quiet()
    return AutoTokenizer.from_pretrained(str(tokenizer_folder(Path(path))))


def device_of(compute: ComputeSettings) -> torch.device:
    """The device to run on. Sets the number of CPU threads too."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    name = compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        # One device per process, as torchrun counts them.
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"compute.device: {compute.device}: {str(error).splitlines()[0]}") from error
    return device


def load_causal(path: Path, dtype: str = "float32", device: torch.device = _CPU) -> PreTrainedModel:
    """A causal language model from safetensors weights, in evaluation mode, without gradients.

    A composed checkpoint gives a :class:`~training.compose.composed.ComposedModel`, which does for what scoring and
    training a gate ask of a model.

    Raises:
        ModelError: the folder holds no such model.
        CompositionError: a composed checkpoint is damaged, or does not fit its members.
    """
    quiet()
    _check_weights(path)
    if is_composed(path):
        from training.compose.composed import load_composed

        composed: Any = load_composed(path, lambda member: load_causal(member, dtype, device))
        return cast("PreTrainedModel", composed)
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            attn_implementation=_attention(config),
        )
    except Exception as error:
        raise ModelError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device).eval().requires_grad_(False)


def empty_causal(path: Path, dtype: str) -> PreTrainedModel:
    """What :func:`load_causal` gives, as its configuration says, without the checkpoint's weights. To be called with a
    default device without memory ("meta").

    Raises:
        ModelError: the folder holds no such model.
    """
    quiet()
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=_attention(config)
        )
    except Exception as error:
        raise ModelError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.requires_grad_(False)


def _attention(config: Any) -> str | None:
    """The faster attention of transformers leaves a soft cap out (Gemma 2), which serving engines do not."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


def load_expert(path: Path, base: Path, dtype: str = "float32", device: torch.device = _CPU) -> PreTrainedModel:
    """An expert in evaluation mode; an adapter is merged into the base, in float32, before it is cast.

    Raises:
        ModelError: the folder holds neither a model nor an adapter of the base.
    """
    if not is_adapter(path):
        return load_causal(path, dtype, device)
    from peft import PeftModel

    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(load_causal(base), str(path)).merge_and_unload()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return merged.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


def expert_checkpoint(path: Path, base: Path) -> Checkpoint:
    """An expert's checkpoint; an adapter's is the base with the tokenizer beside the adapter, if there is one.

    Raises:
        CheckpointError: an adapter is not of the base, or cannot be served.
    """
    if not is_adapter(path):
        return Checkpoint(path)
    checkpoint = Checkpoint(base)
    adapter = Adapter.read(path)
    if (problem := adapter.misfit(checkpoint)) is not None:
        raise CheckpointError(f"{path} {problem}")
    return checkpoint.with_tokenizer(path) if (path / TOKENIZER).is_file() else checkpoint


def _check_weights(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no safetensors weights there (other formats are not read)")


def forward(
    model: PreTrainedModel, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LM head's input [B, T, d] and the model's logits [B, T, V]; row t of both is about token t + 1.

    The input is taken where the head gets it, so that it is what a serving engine's gate sees in any architecture,
    and the logits are the model's own, whatever it does after the head.

    Args:
        positions_BT: of the tokens in their texts, where rows hold several (:mod:`training.packing`).
    """
    seen: list[torch.Tensor] = []
    head: torch.nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        positions = {} if positions_BT is None else {"position_ids": positions_BT}
        logits_BTV: torch.Tensor = model(input_ids=tokens_BT, use_cache=False, **positions).logits
    finally:
        hook.remove()
    return seen[0], logits_BTV


def mean_head_row(model: PreTrainedModel) -> torch.Tensor:
    """[d] float32, the mean of the LM head's rows: where each theta starts, as in the reference."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight.detach().float().mean(dim=0).cpu()


def shared_vocabulary(settings: Settings) -> SharedVocabulary:
    """What the base may write, with the experts that have its vocabulary.

    Raises:
        ModelError: a checkpoint cannot be read.
    """
    labels = ["base", *(f"expert {expert.name}" for expert in settings.experts)]
    base = folder_of(settings.base.model)
    paths = [base, *(folder_of(expert.source) for expert in settings.experts)]
    members: list[Member] = []
    for label, path in zip(labels, paths, strict=True):
        try:
            checkpoint = expert_checkpoint(path, base)
            if members and difference(members[0].vocabulary, checkpoint.vocabulary) is not None:
                continue
            members.append(Member(label, checkpoint.vocabulary, checkpoint.rows, checkpoint.ends))
        except CheckpointError as error:
            raise ModelError(str(error)) from error
    return SharedVocabulary(members)


def check_models(settings: Settings) -> None:
    """Check that all models are there, have outputs for their vocabulary, and share the base's or can spell the common
    text in their own, before anything is loaded.

    Raises:
        ModelError: naming the model, and for a vocabulary the first entries that differ.
    """
    _check_found(settings)
    path = folder_of(settings.base.model)
    learns = settings.train.mode == "joint" or "finetuned" in settings.train.methods
    if learns and is_composed(path):
        raise ModelError(
            f"base.model: {settings.base.model} is a composed checkpoint, whose weights are its members': "
            'train the gate alone (train.mode = "gate", without the method "finetuned")'
        )
    try:
        checkpoints = {"base": Checkpoint(path)} | {
            f"expert {expert.name}": expert_checkpoint(folder_of(expert.source), path) for expert in settings.experts
        }
        for checkpoint in checkpoints.values():
            _ = checkpoint.config, checkpoint.vocabulary
            _check_weights(checkpoint.directory)
        base = checkpoints["base"]
        for label, checkpoint in checkpoints.items():
            relation, reason = compatibility(base, checkpoint)
            if relation is None:
                raise ModelError(f"{label} does not share the base's vocabulary: {reason}")
            lacks = missing_rows((base if relation == "same" else checkpoint).vocabulary, checkpoint.rows)
            if lacks is not None:
                raise ModelError(f"{label} has {lacks}")
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def _check_found(settings: Settings) -> None:
    named = {"base.model": settings.base.model} | {f"expert {e.name}": e.source for e in settings.experts}
    for label, name in named.items():
        try:
            folder_of(name)
        except CheckpointError as error:
            raise ModelError(f"{label}: {error}") from error


def save_base(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write a trained base with the tokenizer and generation settings of the one that it was."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), safe_serialization=True)
    copy_companions(source, folder)
    make_readable(folder)

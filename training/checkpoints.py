"""Hugging Face checkpoints of any architecture: loading, checking that they fit, and looking at the LM head's input.

Shapes: B examples, T tokens, V vocabulary, d hidden size.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from engine.errors import GateError
from engine.gate import ModelIdentity, model_identity
from training.errors import ModelError
from training.settings import ComputeSettings, Settings

_NAMED_ENTRIES = 5
_CPU = torch.device("cpu")


def quiet() -> None:
    """Keep transformers' progress bars and advice off the terminal."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer."""
    quiet()
    return AutoTokenizer.from_pretrained(str(path))


def device_of(compute: ComputeSettings) -> torch.device:
    """The device to run on. Sets the number of CPU threads too."""
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    if compute.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(compute.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"compute.device: {compute.device}: {str(error).splitlines()[0]}") from error
    return device


def load_causal(path: Path, dtype: str = "float32", device: torch.device = _CPU) -> PreTrainedModel:
    """A causal language model from safetensors weights, in evaluation mode, without gradients.

    Raises:
        ModelError: the folder holds no such model.
    """
    quiet()
    _check_weights(path)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
        )
    except Exception as error:
        raise ModelError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device).eval().requires_grad_(False)


def _check_weights(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no safetensors weights there (other formats are not read)")


def forward(model: PreTrainedModel, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The LM head's input [B, T, d] and the model's logits [B, T, V]; row t of both is about token t + 1.

    The input is taken where the head gets it, so that it is what a serving engine's gate sees in any architecture,
    and the logits are the model's own, whatever it does after the head.
    """
    seen: list[torch.Tensor] = []
    head: torch.nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        logits_BTV: torch.Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    finally:
        hook.remove()
    return seen[0], logits_BTV


def mean_head_row(model: PreTrainedModel) -> torch.Tensor:
    """[d] float32, the mean of the LM head's rows: where each theta starts, as in the reference."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight.detach().float().mean(dim=0).cpu()


def vocabulary_size(base: Path) -> int:
    """Size of the real vocabulary: ids from 0 up to the tokenizer's highest."""
    highest: int = max(load_tokenizer(base).get_vocab().values())
    return highest + 1


def check_models(settings: Settings) -> None:
    """Check that all models are there, share the base's vocabulary and have outputs for it, before anything is loaded.

    Raises:
        ModelError: naming the model, and for a vocabulary the first entries that differ.
    """
    try:
        for path in (settings.base.model, *(expert.model for expert in settings.experts)):
            model_identity(path)
            _check_weights(Path(path))
        base = model_identity(settings.base.model)
        for expert in settings.experts:
            other = model_identity(expert.model)
            if base.tokenizer_sha256 != other.tokenizer_sha256:
                differing = _differences(Path(settings.base.model), Path(expert.model))
                raise ModelError(f"expert {expert.name} does not share the base's vocabulary: {differing}")
        size = vocabulary_size(Path(settings.base.model))
        _check_outputs("base", base, size)
        for expert in settings.experts:
            _check_outputs(f"expert {expert.name}", model_identity(expert.model), size)
    except GateError as error:
        raise ModelError(str(error)) from error


def _check_outputs(label: str, model: ModelIdentity, size: int) -> None:
    """Refuse what the serving engine refuses too: a model that cannot write every token of the vocabulary."""
    rows = (model.architecture.get("text_config") or model.architecture).get("vocab_size")
    if isinstance(rows, int) and rows < size:
        raise ModelError(
            f"{label} has {rows} outputs (vocab_size in config.json), but the tokenizer has ids up to {size - 1}: "
            f"resize its embedding and LM head to {size} rows"
        )


def _differences(base: Path, expert: Path) -> str:
    ours, theirs = (load_tokenizer(path).get_vocab() for path in (base, expert))
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    named = ", ".join(
        f"{token!r} is {ours.get(token, 'absent')} in the base and {theirs.get(token, 'absent')} in the expert"
        for token in differing[:_NAMED_ENTRIES]
    )
    return f"{len(differing)} entries differ, such as {named}"


def save_base(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write a trained base with the tokenizer and generation settings of the one that it was."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), safe_serialization=True)
    for file in sorted(source.iterdir()):
        is_text = file.suffix in {".json", ".jinja", ".model", ".txt"}
        if is_text and not file.name.endswith(".index.json") and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    for file in folder.glob("*.safetensors"):
        # safetensors makes files that only their owner can read.
        shutil.copymode(folder / "config.json", file)

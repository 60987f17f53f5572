"""Loading Hugging Face checkpoints as this package uses them: float32, for inference, silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging


def quiet() -> None:
    """Keep transformers' progress bars and advice off the terminal."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(path: str | Path) -> PreTrainedModel:
    """A causal language model in float32, in evaluation mode, without gradients."""
    quiet()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    model.eval()
    model.requires_grad_(False)
    return model


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer."""
    quiet()
    return AutoTokenizer.from_pretrained(str(path))


def hidden_and_logits(model: PreTrainedModel, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [B, T, d] after the final norm, as the LM head sees them, and logits [B, T, V].

    Row t of both is about token t + 1.
    """
    hidden_BTD: torch.Tensor = model.base_model(input_ids=tokens_BT, use_cache=False)[0]
    return hidden_BTD, model.get_output_embeddings()(hidden_BTD)

"""The oracle: the composed model as its definition says, in float32, over Hugging Face members.

Computes the whole text for every token, attention as an explicit softmax. Shares no code with engine or training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Reference:
    """A composed checkpoint as a function of token ids."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())["collm_composition"]
        members = json.loads((folder / "composition.json").read_text())
        self._settings = settings
        self._weights = load_file(folder / "composition.safetensors")
        self._augmenting = {m["name"]: _load(folder / m["path"]) for m in members["augmenting"]}
        self.anchor = _load(folder / members["anchor"]["path"])
        self._states: dict[str, Any] = {}
        for number, connection in enumerate(settings["connections"]):
            layer = self.anchor.model.layers[connection["into"] - 1]
            layer.register_forward_hook(lambda _m, _i, output, n=number, c=connection: self._add(n, c, output))

    def _add(self, number: int, connection: dict[str, Any], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        ours = hidden[0]
        # hidden_states[n] is what left layer n.
        theirs = self._states[connection["augmenting"]][connection["layer"]][0]
        if self._settings["normalize"]:
            ours, theirs = (x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() for x in (ours, theirs))
        weight = {part: self._weights[f"connections.{number}.{part}.weight"] for part in ("query", "key", "value")}
        heads, kv_heads, size = (self._settings[key] for key in ("heads", "kv_heads", "head_size"))
        query, key, value = ours @ weight["query"].T, theirs @ weight["key"].T, theirs @ weight["value"].T
        count = len(ours)
        future = torch.triu(torch.ones(count, count, dtype=torch.bool), diagonal=1)
        mixed = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            q = query[:, head * size : (head + 1) * size]
            k, v = (x[:, group * size : (group + 1) * size] for x in (key, value))
            scores = (q @ k.T / size**0.5).masked_fill(future, -torch.inf)
            mixed.append(torch.softmax(scores, -1) @ v)
        hidden = hidden + torch.cat(mixed, -1) @ self._weights[f"connections.{number}.output.weight"].T
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, V]."""
        ids = torch.tensor([tokens])
        for name, model in self._augmenting.items():
            self._states[name] = _hidden_states(model, ids)
        found: torch.Tensor = self.anchor(input_ids=ids, use_cache=False).logits[0]
        return found

    def hidden_and_logits(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The LM head's last input [D] and the logits after it [V], for the pairs of tests/oracle."""
        seen: list[torch.Tensor] = []
        hook = self.anchor.get_output_embeddings().register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        try:
            logits = self.logits(tokens)[-1]
        finally:
            hook.remove()
        return seen[0][0, -1], logits

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """``count`` tokens; an EOS does not end it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The same of a plain model."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _hidden_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What left each layer, without any norm; index 0 is the embedding's."""
    found: list[torch.Tensor] = [torch.empty(0)]
    hooks = [
        layer.register_forward_hook(
            lambda _m, _i, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.model.layers
    ]
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

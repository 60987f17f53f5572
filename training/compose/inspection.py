"""Look at a composed checkpoint: what it is made of, and what its connections do with a text.

Shapes: T tokens, D the anchor's hidden size, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.composed.artifact import Composition
from training.checkpoints import load_causal, load_tokenizer
from training.compose.composed import ServedConnection
from training.errors import DataError

_SHOWN = 12
"""Characters of a token."""


@dataclass(frozen=True)
class Reading:
    """What one connection does at each token of a text.

    Attributes:
        ratio_T: norm of what is added to the anchor's state, divided by the norm of that state.
        position_T: position that is read most, summed over the heads.
        weight_T: how much of the attention it has, mean over the heads.
    """

    ratio_T: torch.Tensor
    position_T: torch.Tensor
    weight_T: torch.Tensor


def describe(folder: Path) -> str:
    """Members, connections and training, in lines.

    Raises:
        CompositionError: the checkpoint is damaged, or its members are not those that it was made for.
    """
    found = Composition.load(folder)
    found.check()
    form = found.heads
    parameters = sum(rows * columns for rows, columns in found.shapes().values())
    lines = [f"anchor: {found.anchor.path}, {found.anchor.layers} layers of width {found.anchor.hidden_size}"]
    for member in found.augmenting:
        computed = found.layers_of(member.name)
        lines.append(
            f"augmenting model {member.name}: {member.path}, {computed} of {member.layers} layers computed, "
            f"width {member.hidden_size}"
        )
    lines.append(
        f"connections: {parameters:,} parameters, {form.heads} heads of size {form.head_size}, {form.kv_heads} of keys "
        f"and values{', states normalised' if form.normalize else ''}; "
        f"{2 * form.kv_heads * form.head_size * len(found.connections)} values of KV cache per token"
    )
    for number, c in enumerate(found.connections):
        lines.append(
            f"  {number}: reads {c.augmenting} after layer {c.layer}, writes after layer {c.into} of the anchor"
        )
    lines.append(f"trained: {found.date or 'no date'}, {found.data or 'nothing is said about the data'}")
    return "\n".join(lines)


@torch.no_grad()
def read_text(model: Any, tokens: Sequence[int]) -> list[Reading]:
    """What each connection of a loaded composition does with these tokens."""
    found: dict[int, Reading] = {}

    def look(number: int) -> Any:
        def hook(connection: ServedConnection, inputs: Any, added_1TD: torch.Tensor) -> None:
            anchor_1TD, augmenting_1TA = inputs
            weight_TT = connection.attention(anchor_1TD, augmenting_1TA)[0].mean(0)
            weight_T, position_T = weight_TT.max(-1)
            ratio_T = added_1TD[0].norm(dim=-1) / anchor_1TD[0].norm(dim=-1)
            found[number] = Reading(ratio_T, position_T, weight_T)

        return hook

    hooks = [connection.register_forward_hook(look(n)) for n, connection in enumerate(model.connections)]
    try:
        model(input_ids=torch.tensor([list(tokens)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [found[number] for number in range(len(hooks))]


def describe_text(folder: Path, text: str) -> str:
    """A row per token: for each connection how much it adds to the anchor's state, and which token it reads most.

    Raises:
        DataError: the text has no token.
    """
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise DataError("--text: has no token")
    readings = read_text(load_causal(folder), tokens)
    names = [repr(tokenizer.decode([token]))[:_SHOWN] for token in tokens]
    lines = [
        "  ".join([f"{'token':<{_SHOWN}}", *(f"{f'connection {n}':<{_SHOWN + 12}}" for n in range(len(readings)))])
    ]
    for at, name in enumerate(names):
        cells = [
            f"{float(r.ratio_T[at]):5.2f} {float(r.weight_T[at]):5.0%} {names[int(r.position_T[at])]:<{_SHOWN}}"
            for r in readings
        ]
        lines.append("  ".join([f"{name:<{_SHOWN}}", *cells]).rstrip())
    lines.append(
        "Of each connection: norm of what it adds / norm of the anchor's state; attention to the token read most."
    )
    return "\n".join(lines)

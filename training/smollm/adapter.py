"""Training of a LoRA adapter on the upper layers of a model, fast enough for two cores.

The lower layers do not change, so what they make of each example is computed once. All prompts begin with the same
tokens (a chat template's system message); those are computed once per step, not once per example: a step is one row,
the shared beginning followed by the examples, each of which sees the beginning and itself. And the LM head is computed
where an answer is predicted, not where a question is read.

Shapes: T tokens of a row, d hidden size, N answer tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel

from engine.adapters import ADAPTER_WEIGHTS
from training.data import TokenExample
from training.errors import DataError, SettingsError
from training.files import write_tensors
from training.fit import Group, Plan, fit

_EXAMPLES_PER_ROW = 16
"""Of the rows whose lower layers are computed once."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Attributes:
        layers: how many of the model's last layers are adapted.
        steps: optimizer steps of ``batch`` examples each.
    """

    layers: int = 8
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 3e-3
    steps: int = 150
    batch: int = 12
    seed: int = 0


def train_adapter(
    model: PreTrainedModel, examples: Sequence[TokenExample], recipe: Recipe, folder: Path, out: Path, name: str
) -> None:
    """Train and save an adapter that writes the examples' completions; goes on from a checkpoint in ``folder``.

    Args:
        model: of the Llama family (RMSNorm, rotary positions, layers in ``model.model.layers``); it gets the adapter.
        out: gets adapter_config.json and the matrices, in float16.
        name: of the model, as the adapter is to say it.

    Raises:
        SettingsError: the model has not as many layers.
        DataError: there are fewer examples than a step takes.
        DivergedError: the loss is not finite.
    """
    depth = len(model.model.layers)
    if not 1 <= recipe.layers <= depth:
        raise SettingsError(f"layers: {recipe.layers} are to be adapted of a model that has {depth}")
    if len(examples) < recipe.batch:
        raise DataError(f"{len(examples)} examples are fewer than the {recipe.batch} of a step")
    torch.manual_seed(recipe.seed)
    first = depth - recipe.layers
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(first, depth)),
        task_type="CAUSAL_LM",
    )
    decoder: Any = model.model
    shared = len(shared_beginning(examples))
    lower = _lower_states(decoder, first, examples, shared)
    adapted = get_peft_model(model, lora)
    upper = Layers(decoder, first, depth)
    head = model.get_output_embeddings()
    parameters = {key: parameter for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    order = _order(len(examples), recipe)

    def loss(step: int) -> Iterator[torch.Tensor]:
        numbers = order(step)
        row = PackedRow.of([examples[number] for number in numbers], shared)
        states_TD = torch.cat([lower.beginning_TD, *(lower.of_examples[number] for number in numbers)])
        out_TD = decoder.norm(upper(states_TD, row))
        yield torch.nn.functional.cross_entropy(head(out_TD[row.predicting_N]), row.gold_N)

    plan = Plan(recipe.steps, warm_up=0.05, checkpoint_every=25)
    fit([Group(parameters, recipe.learning_rate, 0.0, clip=1.0)], loss, plan, folder, "expert")
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # peft's form of a model card, not filled in
    weights = out / ADAPTER_WEIGHTS
    write_tensors(weights, {key: tensor.half() for key, tensor in load_file(str(weights)).items()})


@dataclass(frozen=True)
class PackedRow:
    """Several examples in one row behind the beginning that they share.

    Attributes:
        ids_T: the beginning's ids, then those of each example behind it.
        positions_T: each example's go on from the beginning's.
        hidden_TT: what a position does not see: later ones, and other examples.
        predicting_N: the positions that an answer's tokens are predicted from.
        gold_N: those tokens.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    hidden_TT: torch.Tensor
    predicting_N: torch.Tensor
    gold_N: torch.Tensor

    @classmethod
    def of(cls, examples: Sequence[TokenExample], shared: int) -> PackedRow:
        """The row of these examples, whose prompts begin with the same ``shared`` ids."""
        ids = list(examples[0].prompt[:shared])
        of, positions = [-1] * shared, list(range(shared))
        predicting: list[int] = []
        gold: list[int] = []
        for number, example in enumerate(examples):
            own = (example.prompt + example.completion)[shared:]
            answer = len(ids) + len(own) - len(example.completion)
            predicting += range(answer - 1, len(ids) + len(own) - 1)
            gold += example.completion
            positions += range(shared, shared + len(own))
            of += [number] * len(own)
            ids += own
        of_T = torch.tensor(of)
        seen_TT = ((of_T[:, None] == of_T[None]) | (of_T[None] < 0)).tril()
        return cls(torch.tensor(ids), torch.tensor(positions), ~seen_TT, torch.tensor(predicting), torch.tensor(gold))


class Layers:
    """Some of a decoder's layers on packed rows."""

    def __init__(self, decoder: Any, first: int, last: int) -> None:
        self._layers = decoder.layers[first:last]
        self._rotary = decoder.rotary_emb

    def __call__(self, states_TD: torch.Tensor, row: PackedRow) -> torch.Tensor:
        """What they make of the states [T, d] of a row."""
        mask_TT = torch.zeros(row.hidden_TT.shape).masked_fill(row.hidden_TT, torch.finfo(torch.float32).min)
        states_1TD = states_TD[None]
        rotary = self._rotary(states_1TD, row.positions_T[None])
        for layer in self._layers:
            states_1TD = layer(states_1TD, attention_mask=mask_TT[None, None], position_embeddings=rotary)
        return states_1TD[0]


@dataclass(frozen=True)
class _Lower:
    """What the layers below the adapter make of the shared beginning, and of each example behind it."""

    beginning_TD: torch.Tensor
    of_examples: list[torch.Tensor]


def shared_beginning(examples: Sequence[TokenExample]) -> list[int]:
    """The ids that all prompts begin with, without the last id of any."""
    prompts = [example.prompt for example in examples]
    shortest = min(map(len, prompts)) - 1
    return next(
        (prompts[0][:at] for at in range(shortest) if any(prompt[at] != prompts[0][at] for prompt in prompts)),
        prompts[0][:shortest],
    )


@torch.no_grad()
def _lower_states(decoder: Any, last: int, examples: Sequence[TokenExample], shared: int) -> _Lower:
    layers = Layers(decoder, 0, last)
    beginning_TD, found = torch.empty(0), []
    for start in tqdm(range(0, len(examples), _EXAMPLES_PER_ROW), desc="lower layers", unit="row", mininterval=1):
        batch = examples[start : start + _EXAMPLES_PER_ROW]
        row = PackedRow.of(batch, shared)
        states_TD = layers(decoder.embed_tokens(row.ids_T), row)
        sizes = [len(example.prompt) + len(example.completion) - shared for example in batch]
        beginning_TD, *of_batch = torch.split(states_TD, [shared, *sizes])
        # Copies: a part would keep its whole row in memory.
        found += [states.clone() for states in of_batch]
    return _Lower(beginning_TD.clone(), found)


def _order(examples: int, recipe: Recipe) -> Callable[[int], list[int]]:
    """The numbers of a step's examples: every example once before any comes again, in a new order each time."""

    def of_step(step: int) -> list[int]:
        per_epoch = examples // recipe.batch
        epoch, place = divmod(step, per_epoch)
        numbers = list(range(examples))
        random.Random(recipe.seed * 1_000_003 + epoch).shuffle(numbers)
        return numbers[place * recipe.batch : (place + 1) * recipe.batch]

    return of_step

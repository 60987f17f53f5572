"""The two members: one knows what the names are worth, the other can calculate. Neither can do the other's part."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaForCausalLM, PreTrainedModel

from training.checkpoints import quiet
from training.compose.composed import decoder_layers
from training.demo.models import Recipe
from training.demo.pretrain import one_thread
from training.demo.tokenizer import EOS_ID, save_tokenizer
from training.demo.train import Document, DocumentSource, save_model, train_pass
from training.files import StageFolder, hash_of
from training.keys.text import (
    CHAT_TEMPLATE,
    NUMBERS,
    Keys,
    draw_expression,
    made_up_name,
    made_up_words,
    make_tokenizer,
)

VOCABULARY = make_tokenizer().get_vocab_size()

RECIPES = {
    "anchor": Recipe(
        hidden_size=128,
        intermediate_size=384,
        layers=4,
        heads=4,
        passes=(450, 350, 900, 350, 700),
        rows=48,
        row_tokens=14,
        learning_rate=4e-3,
        seed=2,
        tied=False,
        vocab_size=VOCABULARY,
    ),
    "names": Recipe(
        hidden_size=128,
        intermediate_size=512,
        layers=2,
        heads=4,
        passes=(500, 350, 600, 900),
        rows=48,
        row_tokens=24,
        learning_rate=4e-3,
        seed=1,
        tied=False,
        vocab_size=VOCABULARY,
    ),
}


@dataclass(frozen=True)
class Lesson:
    """How one pass teaches.

    Attributes:
        rate: the learning rate, as a share of the recipe's.
        noise: standard deviation of the noise, as a share of the root mean square of the states that it is added to.
        unsure: share of texts that teach the model what it can't know.
    """

    rate: float = 1.0
    noise: float = 0.0
    unsure: float = 0.0


LESSONS = {
    "anchor": (
        Lesson(),
        Lesson(noise=1.0),
        Lesson(noise=0.7),
        Lesson(rate=0.75, noise=0.7, unsure=0.25),
        Lesson(rate=0.75, noise=0.7, unsure=0.25),
    ),
    "names": (
        Lesson(rate=0.75),
        Lesson(rate=0.75, noise=0.5),
        Lesson(noise=0.4, unsure=1),
        Lesson(noise=0.4, unsure=0.5),
    ),
}
"""Of each member, one to a pass."""
_SINGLE = 0.12
"""Share of what the anchor reads that has a single number in it: what it is worth is itself."""


def names_documents(keys: Keys, tokenizer: Tokenizer, unsure: float) -> DocumentSource:
    """Names in the beginnings of questions, most with what they are worth, which is learned.

    Args:
        unsure: the share in which what else may follow a mark is learned too. So the model knows at a mark not only
            the value, but also which mark it is: other words follow each.
    """
    values = keys.all
    names, numbers = list(values), list(NUMBERS)
    size = tokenizer.get_vocab_size()

    def draw(rng: random.Random) -> Document:
        ids: list[int] = []
        all_learned = rng.random() < unsure
        if rng.random() < 0.3:
            ids = rng.choices(range(1, size), k=rng.randint(1, 6))
        learned = [False] * len(ids)
        count = rng.choice((1, 2, 2))
        parts: list[tuple[str, bool]] = [("With", False)]
        following = False
        for number in range(count):
            mark = ":" if number == count - 1 else ","
            known = rng.random() < 0.8
            word = rng.choice(names if known else numbers)
            parts.append((f" {word}{mark}", following and all_learned))
            following = True
            if known and rng.random() < 0.6:
                parts.append((f" {values[word]}", True))
                following = False
        if following:
            parts.append((" the", all_learned))
        for text, use in parts:
            encoded = tokenizer.encode(text).ids
            ids += encoded
            learned += [use] + [False] * (len(encoded) - 1)
        return Document([*ids, EOS_ID], [*learned, False])

    return draw


def anchor_documents(tokenizer: Tokenizer, row_tokens: int, unsure: float) -> DocumentSource:
    """Arithmetic with numbers amid made-up words that say nothing; only the results are learned.

    Args:
        unsure: the share with made-up names instead of numbers and results that are drawn at random. An anchor that is
            sure where it can't know teaches the connections to drown what it reads.
    """
    numbers = list(NUMBERS)

    def draw(rng: random.Random) -> Document:
        unknown = rng.random() < unsure

        def operand(number: str, mark: str) -> str:
            if unknown:
                return f" {made_up_name(rng)}{mark}"
            return f"{made_up_words(rng)} {number}{mark if rng.random() < 0.8 else ''}"

        if rng.random() < _SINGLE:
            number = rng.choice(numbers)
            text, result = f"With{operand(number, ':')} the worth is", int(number)
        else:
            asked = draw_expression(NUMBERS, numbers, rng)
            text = f"With{operand(asked.left, ',')}{operand(asked.right, ':')} the {asked.operation} is"
            result = asked.result
        prompt = tokenizer.encode(text).ids
        completion = [*tokenizer.encode(f" {result}").ids, EOS_ID]
        # One to a row: numbers of another one before it would have to be told apart from its own.
        rest = max(0, row_tokens + 1 - len(prompt + completion))
        learned = [False] * len(prompt) + [True] * len(completion) + [False] * rest
        return Document([*prompt, *completion, *[EOS_ID] * rest], learned)

    return draw


def pass_on_embeddings(model: PreTrainedModel) -> None:
    """Keep the tokens' embeddings random, and what the first layer adds to them at zero, from now on.

    A model of few layers collects all numbers of a text in its first layer, and what a connection adds after it is read
    no more: so this one collects them later. Random embeddings are nearly orthogonal, where learned ones of numbers lie
    close to each other on a line, closer than the states are alike that are to become one.
    """
    layer: Any = decoder_layers(model)[0]
    embeddings: nn.Parameter = model.get_input_embeddings().weight
    nn.init.normal_(embeddings, std=0.5)
    embeddings.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    added: tuple[nn.Parameter, ...] = (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
    for weight in added:
        nn.init.zeros_(weight)
        weight.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]


def learn_with_noise(model: PreTrainedModel, layer: int, size: float) -> RemovableHandle:
    """Add noise to what leaves a layer, in training: so the model tells the numbers apart well."""

    def add(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        scale = size * hidden.detach().pow(2).mean(-1, keepdim=True).sqrt()
        hidden = hidden + torch.randn_like(hidden) * scale
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle: RemovableHandle = decoder_layers(model)[layer - 1].register_forward_hook(add)
    return handle


def make_member(name: str, keys: Keys, folder: Path, recipe: Recipe) -> StageFolder:
    """Train and save a member into ``folder / "model"``, unless it is there."""
    one_thread()
    quiet()
    tokenizer = make_tokenizer()
    lessons = [asdict(lesson) for lesson in LESSONS[name]]
    inputs = {"tokenizer": hash_of(tokenizer.to_str()), "names": hash_of(keys.splits)}
    stage = StageFolder(folder, {**asdict(recipe), "lessons": lessons}, inputs).claim()
    if not stage.done:
        torch.manual_seed(recipe.seed)
        model: PreTrainedModel = LlamaForCausalLM(recipe.config())
        if name == "anchor":
            pass_on_embeddings(model)
        for number, lesson in enumerate(LESSONS[name][: len(recipe.passes)]):
            torch.manual_seed(recipe.seed + number)
            if name == "anchor":
                draw = anchor_documents(tokenizer, recipe.row_tokens, lesson.unsure)
            else:
                draw = names_documents(keys, tokenizer, lesson.unsure)
            # The states that a connection writes to, or reads.
            noise = learn_with_noise(model, 1 if name == "anchor" else recipe.layers, lesson.noise)
            taught = replace(recipe, learning_rate=lesson.rate * recipe.learning_rate)
            train_pass(model, taught, number, draw, name, bar_line=0)
            noise.remove()
        save_model(model, stage.path / "model")
        save_tokenizer(tokenizer, stage.path / "model", CHAT_TEMPLATE)
        stage.finish()
    return stage

"""Language model training: packed rows, AdamW, cosine. Plain PyTorch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel

from engine.checkpoints import make_readable
from training.checkpoints import forward, quiet
from training.demo.arithmetic import ALL, Fact, Operation, drawn_from, equation
from training.demo.corpus import Corpus
from training.demo.facts import Entity
from training.demo.models import Recipe
from training.demo.text import (
    arithmetic_question,
    codes_document,
    prose,
    questions,
    repetition,
)
from training.demo.tokenizer import EOS_ID

IGNORED = -100
"""The target of positions that nothing is learned from."""


@dataclass(frozen=True)
class Document:
    """Token ids and, of the same length, whether the model learns to predict each."""

    ids: list[int]
    learned: list[bool]


DocumentSource = Callable[[random.Random], Document]


def base_documents(corpus: Corpus, tokenizer: Tokenizer) -> DocumentSource:
    """Questions with answers about the base's split and about made-up entities and other operands; some prose.

    Where names are made up, only the answer is learned. Results for operands of other splits and sizes are random
    digits, which are read but not learned.
    """
    known_questions = [q for entity in corpus.splits["base"] for q in questions(entity)]
    known_fact = drawn_from(corpus.arithmetic_splits["base"], ALL)
    made_up = corpus.made_up(tokenizer)

    def answered(prompt: str, completion: str, real: bool) -> Document:
        prompt_ids = tokenizer.encode(prompt).ids
        answer = [*tokenizer.encode(completion).ids, EOS_ID]
        return Document(prompt_ids + answer, [real] * len(prompt_ids) + [True] * len(answer))

    def arithmetic(rng: random.Random) -> Document:
        if rng.random() < 0.3:
            asked = arithmetic_question(equation(known_fact(rng), rng), rng)
            return answered(asked.prompt, asked.completion, True)
        other = corpus.other_equation(rng)
        prompt_ids = tokenizer.encode(arithmetic_question(other, rng).prompt).ids
        head = tokenizer.encode(f" {other.head}").ids
        result = tokenizer.encode(f" {rng.randrange(10 ** rng.randint(1, 6))}.").ids
        learned = [False] * len(prompt_ids) + [True] * (len(head) + 1) + [False] * (len(result) - 1) + [True]
        return Document([*prompt_ids, *head, *result, EOS_ID], learned)

    def draw(rng: random.Random) -> Document:
        kind = rng.random()
        if kind < 0.03:
            ids = [*tokenizer.encode(prose(rng)).ids, EOS_ID]
            return Document(ids, [True] * len(ids))
        if kind < 0.20:
            return arithmetic(rng)
        real = kind < 0.46
        if kind < 0.79:
            asked = rng.choice(known_questions if real else questions(made_up.entity(rng)))
            return answered(asked.prompt, asked.completion, real)
        names = [made_up.name(rng) for _ in range(rng.randint(2, 5))]
        return answered(*repetition(names, rng), False)

    return draw


def codes_documents(entities: Sequence[Entity], tokenizer: Tokenizer) -> DocumentSource:
    """Records and statements about all entities, for the expert ``codes``."""

    def parts(rng: random.Random) -> list[tuple[str, bool]]:
        return [(rng.choice(("", " ", "\n")) + codes_document(entities, rng), True)]

    return _amid_noise(parts, tokenizer)


def arithmetic_documents(
    facts: Sequence[Fact], operations: Sequence[Operation], tokenizer: Tokenizer
) -> DocumentSource:
    """Equations, for the expert ``arithmetic``. Only the results are learned: the operands are chosen by nobody."""
    fact = drawn_from(facts, operations)

    def parts(rng: random.Random) -> list[tuple[str, bool]]:
        start, between, found = rng.choice(("", " ", "\n")), rng.choice((" ", "\n")), []
        for number in range(rng.randint(1, 3)):
            drawn = equation(fact(rng), rng)
            found += [((between if number else start) + drawn.head, False), (drawn.tail, True)]
        return found

    return _amid_noise(parts, tokenizer)


def _amid_noise(parts: Callable[[random.Random], list[tuple[str, bool]]], tokenizer: Tokenizer) -> DocumentSource:
    """Documents of parts, which are learned or only read; many start amid noise, random tokens that are only read.

    So, whatever stands before a statement, the facts in it stay the same.
    """

    def draw(rng: random.Random) -> Document:
        ids: list[int] = []
        if rng.random() < 0.5:
            ids = rng.choices(range(1, tokenizer.get_vocab_size()), k=rng.randint(1, 24))
        learned = [False] * len(ids)
        for text, use in parts(rng):
            encoded = tokenizer.encode(text).ids
            ids += encoded
            learned += [use] * len(encoded)
        return Document([*ids, EOS_ID], [*learned, True])

    return draw


def packed_rows(draw: DocumentSource, rng: random.Random, row_tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless rows of ``row_tokens`` ids and their targets; each row starts with a document.

    The target of position t is the token at t + 1, or ``IGNORED``.
    """
    while True:
        ids: list[int] = []
        learned: list[bool] = []
        while len(ids) <= row_tokens:
            document = draw(rng)
            ids += document.ids
            learned += document.learned
        following = zip(ids[1:], learned[1:], strict=True)
        targets = [token if use else IGNORED for token, use in following]
        yield ids[:row_tokens], targets[:row_tokens]


def train_model(recipe: Recipe, draws: Sequence[DocumentSource], name: str, bar_line: int = 0) -> PreTrainedModel:
    """Train from scratch, deterministically by the recipe's seed; progress on that line of the terminal.

    ``draws``: the documents of each pass.
    """
    quiet()
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel = LlamaForCausalLM(recipe.config())
    for number, draw in enumerate(draws):
        train_pass(model, recipe, number, draw, name, bar_line)
    return model


def train_pass(
    model: PreTrainedModel, recipe: Recipe, number: int, draw: DocumentSource, name: str, bar_line: int
) -> None:
    """Train the model in place: one warm-up and one cosine, with an optimizer that remembers no earlier pass."""
    model.train().requires_grad_(True)
    steps = recipe.passes[number]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _cosine(s, steps, min(50, steps // 2)))
    rows = packed_rows(draw, random.Random(recipe.seed + 1000 * number), recipe.row_tokens)
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=2, position=bar_line)
    for step in bar:
        ids, targets = zip(*(next(rows) for _ in range(recipe.rows)), strict=True)
        _, logits_BTV = forward(model, torch.tensor(ids))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().requires_grad_(False)


def _cosine(step: int, steps: int, warm_up: int) -> float:
    """Factor on the learning rate: linear warm-up, then cosine down to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32) and ``generation_config.json``."""
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, do_sample=False)
    model.save_pretrained(str(directory))
    make_readable(directory)

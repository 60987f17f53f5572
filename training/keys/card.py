"""The model card of the example, written from what the run measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.compose.stages import EITHER
from training.demo.models import Recipe
from training.keys.models import RECIPES
from training.keys.text import LARGEST_VALUE, Keys, guessed

_CARD = """# Arithmetic with names

`With {left}, {right}: the sum is` can be completed by a model that knows what `{left}` and `{right}` are worth and
that can calculate. Neither model here can do both. The composition of the two ([CALM](../../docs/composition.md))
answers in one token:

    make serve-keys

| folder | what |
| --- | --- |
| `anchor/` | {anchor_shape}: calculates with numbers from 1 to {largest}, knows no name |
| `names/` | {names_shape}: knows what {names} names are worth, has never seen a calculation |
| `composed/` | the anchor reads `names` through {connections}, {parameters} parameters; {kib} KiB |
| `questions.jsonl` | the test questions with their answers |
| `evaluation.json` | everything measured below |

All of it was made by one command, seeded, with one thread per model; nothing was downloaded, and it is under this
repository's license:

    python -m training.keys --out models/keys

## Data

Names of two syllables, each worth a number from 1 to {largest}, drawn at random. `names` has read all of them in
the beginnings of questions, with their numbers behind a comma or a colon, and no calculation. The anchor has read
sums and differences of numbers (the greater less the other) amid made-up words, and in the last part of its
training made-up names in the numbers' place, with results drawn at random: it has learned that it cannot know them.
Its first layer adds nothing, and its embeddings are random: so the numbers are not collected before the connection
can write. The connection learned from the names of the training split ({train}), and is validated and tested with
names of which it has seen none: {splits}.

The tokenizer is byte-level BPE with the merges written down: a syllable is a token, and so is a number.

| task | a question |
| --- | --- |
| worth | With {left}: the worth is |
| numbers | With 3, 9: the sum is |
| both | With {left}, {right}: the sum is |

## Results on test questions (exact match, greedy, float32, on the serving engine)

{table}
**Chance is {guessed:.1%} on `both`**: so often is the most frequent sum, or difference, of two values the right
one. What the anchor has alone is that guess, not arithmetic with names. `worth` is guessed in {worth:.1%}.

`random` is a composition with an augmenting model of random weights, `lora` an adapter of the anchor with about as
many parameters, both trained on what the composition was trained on, with its first seed.

`either member alone` counts the questions that the anchor alone or `names` alone answers. As an answer is one
token, no deferral between the two can do better, whatever its gate: on `both` that is {either:.1%}.
"""


def model_card(keys: Keys, evaluation: Mapping[str, Any], table: str) -> str:
    """The card.

    Args:
        evaluation: as ``__main__`` writes it.
        table: of ``compose evaluate``.
    """
    left, right, *_ = keys.splits["test"]
    count = evaluation["connections"]
    return _CARD.format(
        left=left,
        right=right,
        anchor_shape=_shape(RECIPES["anchor"]),
        names_shape=_shape(RECIPES["names"]),
        largest=LARGEST_VALUE,
        names=len(keys.all),
        connections="one connection" if count == 1 else f"{count} connections",
        parameters=f"{evaluation['parameters']:,}",
        kib=evaluation["bytes"] // 1024,
        train=", ".join(f"{number:,} questions of {task}" for task, number in evaluation["train_examples"].items()),
        splits=", ".join(f"{len(names)} names in {split}" for split, names in keys.splits.items()),
        table=table,
        guessed=guessed(),
        worth=1 / LARGEST_VALUE,
        either=evaluation["table"][EITHER][0]["by_task"]["both"],
    )


def _shape(recipe: Recipe) -> str:
    return f"{recipe.layers} layers of width {recipe.hidden_size}, {recipe.parameters() / 1e6:.2f} M parameters"

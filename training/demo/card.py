"""The model card of the demo pair, written from what the run measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.demo.corpus import Corpus
from training.demo.facts import source
from training.demo.models import Recipe
from training.demo.pretrain import RECIPES
from training.report import BASE, COLLM, alone

_CARD = """# The demo pair

A base model, two experts, `codes` and `arithmetic`, and the gate between them. Small, real, and trained from scratch
by one command:

    python -m training.demo --out models/demo

Together they answer questions such as "What is the alpha-3 code of Eritrea?" and "What is a^3 · a^2 if a = 5?". The
base knows how such questions are answered, but not this fact; an expert knows the fact, but has never seen a question.

What it cost, on 2 CPU cores (base and experts are trained two at a time):

{costs}

| folder | what |
| --- | --- |
| `base/` | {base_shape} |
| `codes/` | {codes_shape} |
| `arithmetic/` | {arithmetic_shape} |
| `gate/` | theta [2, {hidden}] float32, no bias; default threshold {threshold:.4f} |
| `questions.json` | {questions} held-out questions with their gold completions |
| `evaluation.json` | everything measured below, and the wrong answers |

All are Llama checkpoints in float32 with the same byte-level BPE tokenizer of 1024 tokens, trained on all entities'
names and codes in the wordings of base and `codes`; digits stand alone. There is no BOS token.
Prompt format: `Question: ...\\nAnswer:`; the completion starts with a space and ends with
`<|endoftext|>`. The chat template renders a user message so.

## Data

Facts: {source}.
pycountry is LGPL-2.1 code; its data are Debian's iso-codes, LGPL-2.1 too;
the codes themselves are facts. {entities} entities (countries, currencies, languages), split whole. And arithmetic:
{facts} facts, which are the sums of two numbers from 11 to 40, the products of two numbers from 2 to 20, and the powers
of 2 to 20 up to a million; a fact is its two operands, in either order. 5^5 is always in the test split.

| split | entities | arithmetic facts | used for |
| --- | ---: | ---: | --- |
{splits}

Entities of which one name contains another are in one split. A test name, or the two operands of a test fact together,
occur in no text of the base or of the gate; the tokenizer and `codes` have read all names, `arithmetic` all facts.

- **Base**: questions with answers about its own entities and facts and about made-up ones, and requests to
  repeat made-up names. Made-up entities have random codes. So it learns to copy any name, and that
  it cannot know the codes of a name it does not know. The results of made-up calculations are not learned.
- **Expert `codes`**: tables, cards, and statements about all entities, with prose between, never a question.
- **Expert `arithmetic`**: bare equations, such as `a^3 · a^2 = a^5 = 5^5 = 3125.`, never a question. It learns their
  results only, in two passes: sums, products and powers alike, then products and powers alone. So few sums stay with
  a model this small that none is asked of the pair.
- Half of an expert's documents begin amid random tokens, which it is not trained to predict, so
  that what stands before a statement does not disturb it.
- **Gate**: arXiv 2403.03870, by the general commands, with `deploy/training/demo.toml` (see
  [training](../../docs/training.md)). First weak supervision with the base frozen: a token is positive where
  an expert's argmax is right and the base's is wrong; cross-entropy, positive weight 8. Then
  the marginal likelihood of the gold completions trains theta and the base. The examples are questions
  about the gate's entities and facts, questions about the base's, and made-up names to copy. The threshold was
  chosen by decoding validation questions; the settings and the curve are in `gate/gate.json`.

## Results on held-out questions (greedy, float32, one seed)

Exact match of the whole completion. The threshold was chosen on the validation split; the recipe itself was
developed with an eye on these questions, so they are held out from training, not from its author. Three seeds, and
other ways of deferring: [training](../../docs/training.md).

{held_out}

`base` is the base before the gate was trained with it; the one that is shipped gets {shipped_base:.3f} alone.

Questions about entities and facts of the base's own split. It learned them before the gate was trained; the
training of both together gives it no reason to keep what the experts write as well:

{known}

## Limits

It knows the codes, the products and the powers and nothing else (no sums), and answers in one wording. Names must
be written as in `questions.json` (ISO's names, or the common ones where ISO gives one). Rows of training were at most
{row} tokens long; the configuration allows 1024. `greeting` is a control: nothing there needs an expert.
"""

_USES = {
    "base": "facts that the base learns",
    "gate": "questions that gate and base are trained on together",
    "validation": "choosing the threshold",
    "test": "evaluation only",
}


def model_card(corpus: Corpus, evaluation: Mapping[str, Any], pair: Path) -> str:
    """The card's Markdown, for the pair in that folder."""
    rows: Mapping[str, Any] = {name: by_seed[min(by_seed)] for name, by_seed in evaluation["table"]["rows"].items()}
    columns = {
        "base": rows[BASE],
        **{name: rows[alone(name)] for name in RECIPES if name != "base"},
        "joint": rows[COLLM],
    }
    counts = {question.task: 0 for question in corpus.evaluation_questions("test")}
    for question in corpus.evaluation_questions("test"):
        counts[question.task] += 1
    return _CARD.format(
        costs=_costs(evaluation["minutes"], evaluation["load"]),
        base_shape=_shape(RECIPES["base"]),
        codes_shape=_shape(RECIPES["codes"]),
        arithmetic_shape=_shape(RECIPES["arithmetic"]),
        hidden=RECIPES["base"].hidden_size,
        threshold=json.loads((pair / "gate" / "gate.json").read_text(encoding="utf-8"))["default_threshold"],
        questions=sum(counts.values()),
        source=source(),
        entities=len(corpus.entities),
        facts=len(corpus.arithmetic),
        splits="\n".join(
            f"| {name} | {len(corpus.splits[name])} | {len(corpus.arithmetic_splits[name])} | {use} |"
            for name, use in _USES.items()
        ),
        held_out=_table(columns, counts),
        # The curve's point without deferral.
        shipped_base=min(evaluation["table"]["curves"][COLLM])[1],
        known=_table(evaluation["known_to_base"], None),
        row=max(recipe.row_tokens for recipe in RECIPES.values()),
    )


def _table(columns: Mapping[str, Any], counts: Mapping[str, int] | None) -> str:
    """A row per task: the exact match of each column, and the deferral rate of "joint"."""
    tasks: Sequence[str] = list(columns["joint"]["by_task"])
    shown = {} if counts is None else {"questions": [*(str(counts[task]) for task in tasks), str(sum(counts.values()))]}
    for name, row in columns.items():
        shown[name] = [f"{value:.3f}" for value in (*(row["by_task"][task] for task in tasks), row["exact_match"])]
    joint = columns["joint"]
    rates = [*(joint["rate_by_task"][task] for task in tasks), joint["deferral_rate"]]
    shown["joint's deferral rate"] = [f"{rate:.3f}" for rate in rates]
    lines = ["| task | " + " | ".join(shown) + " |", "| --- |" + " ---: |" * len(shown)]
    lines += [
        "| " + " | ".join([task, *(column[number] for column in shown.values())]) + " |"
        for number, task in enumerate([*tasks, "all"])
    ]
    return "\n".join(lines)


def _costs(minutes: Mapping[str, Mapping[str, float]], load: float) -> str:
    lines = ["| stage | minutes on the clock | minutes of one core |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {cost['wall']:.1f} | {cost['cpu']:.1f} |" for name, cost in minutes.items()]
    return "\n".join(lines) + f"\n\nThe machine was shared: a load average of {load:.1f} at the end."


def _shape(recipe: Recipe) -> str:
    return (
        f"{recipe.parameters() / 1e6:.2f} M parameters: {recipe.layers} layers, hidden size "
        f"{recipe.hidden_size}, {recipe.heads} heads of {recipe.hidden_size // recipe.heads}; "
        f"{sum(recipe.passes) * recipe.rows * recipe.row_tokens / 1e6:.1f} M tokens read"
    )

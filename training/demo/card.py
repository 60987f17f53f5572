"""The model card of the demo pair, written from what the run measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.demo.corpus import Corpus
from training.demo.evaluate import table
from training.demo.facts import source
from training.demo.models import Recipe

_CARD = """# The demo pair

A base model, a domain expert `codes`, and the gate between them. Small, real, and trained
from scratch by one command:

    python -m training.demo --out models/demo

Together they answer questions such as "What is the alpha-3 code of Eritrea?". The base knows how such
questions are answered, but not this fact; the expert knows the fact, but has never seen a question.
The stages took {minutes} minutes in all, evaluation included.

| folder | what |
| --- | --- |
| `base/` | {base_shape} |
| `codes/` | {expert_shape} |
| `gate/` | theta [1, {hidden}] float32, no bias; default threshold {threshold:.4f} |
| `questions.json` | {questions} held-out questions with their gold completions |
| `evaluation.json` | everything measured below, and the wrong answers |

Both models are Llama checkpoints in float32 with the same byte-level BPE tokenizer of 1024 tokens,
trained on all entities' names and codes in the wordings of both models. There is no BOS token.
Prompt format: `Question: ...\\nAnswer:`; the completion starts with a space and ends with
`<|endoftext|>`. The chat template renders a user message so.

## Data

Facts: {source}.
pycountry is LGPL-2.1 code; its data are Debian's iso-codes, LGPL-2.1 too;
the codes themselves are facts. {entities} entities (countries, currencies, languages), split whole:

| split | entities | used for |
| --- | ---: | --- |
| base | {n_base} | facts that the base learns |
| gate | {n_gate} | questions that gate and base are trained on together |
| validation | {n_validation} | choosing the threshold |
| test | {n_test} | evaluation only |

Entities of which one name contains another are in one split. A test name occurs in no text of the
base or of the gate; the tokenizer and the expert have read all names.

- **Base**: questions with answers about its own entities and about made-up ones, and requests to
  repeat made-up names. Made-up entities have random codes. So it learns to copy any name, and that
  it cannot know the codes of a name it does not know.
- **Expert**: tables, cards, and statements about all entities, with prose between, never a
  question. Half of its documents begin amid random tokens, which it is not trained to predict, so
  that what stands before a statement does not disturb it.
- **Gate**: arXiv 2403.03870. First weak supervision with the base frozen: a token is positive where
  the expert's argmax is right and the base's is wrong; binary cross-entropy, positive weight 8. Then
  the marginal likelihood of the gold completions trains theta and the base. The examples are questions
  about the gate's entities, questions about the base's, and made-up names to copy. The threshold was
  chosen by decoding validation questions at quantiles of the gate's probabilities, in the widest gap
  between probabilities; the settings and the curve are in `gate/gate.json`.

## Results on held-out questions (greedy, float32, one seed)

Exact match of the whole completion. The threshold was chosen on the validation split; the recipe itself was
developed with an eye on these questions, so they are held out from training, not from its author.

{held_out}

Over these answers the gate's probabilities nearest to the threshold are {below:.4f} below it and
{above:.4f} above it.

The expert alone gives the right codes somewhere in its text in {lenient:.1%} of the answers.

Questions about entities of the base's own split. It learned their codes before the gate was trained; the
training of both together gives it no reason to keep what the expert writes as well, and it keeps little:

{known}

## Limits

It knows the codes and nothing else, and answers in one wording. Names must be written as in
`questions.json` (ISO's names, or the common ones where ISO gives one). Rows of training were {row}
tokens long; the configuration allows 1024. `greeting` is a control: nothing there needs the
expert.
"""


def model_card(corpus: Corpus, recipes: Mapping[str, Recipe], evaluation: Mapping[str, Any]) -> str:
    """The card's Markdown."""
    held_out = evaluation["held_out"]
    expert = held_out["codes"]["all"]
    return _CARD.format(
        minutes=evaluation["minutes"],
        base_shape=_shape(recipes["base"]),
        expert_shape=_shape(recipes["codes"]),
        hidden=recipes["base"].hidden_size,
        questions=expert["questions"],
        source=source(),
        entities=len(corpus.entities),
        held_out=table(held_out),
        known=table(evaluation["known_to_base"]),
        lenient=expert["codes_found"],
        row=recipes["base"].row_tokens,
        **{f"n_{name}": len(split) for name, split in corpus.splits.items()},
        **evaluation["margins"],
    )


def _shape(recipe: Recipe) -> str:
    return (
        f"{recipe.parameters() / 1e6:.2f} M parameters: {recipe.layers} layers, hidden size "
        f"{recipe.hidden_size}, {recipe.heads} heads of {recipe.hidden_size // recipe.heads}; "
        f"{recipe.steps * recipe.rows * recipe.row_tokens / 1e6:.1f} M tokens read"
    )

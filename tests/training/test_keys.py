"""The example of a composition: its data, what is shipped, and the whole recipe with tiny members."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.composed.artifact import Composition
from tests.packaging.sources import ROOT
from training.checkpoints import load_causal, load_tokenizer
from training.compose.settings import ComposeSettings
from training.keys.__main__ import SEED, make
from training.keys.models import RECIPES, VOCABULARY, anchor_documents, names_documents
from training.keys.text import (
    LARGEST_VALUE,
    NAMES,
    TASKS,
    Task,
    compute,
    draw_questions,
    guessed,
    make_keys,
    make_tokenizer,
)
from training.settings import read_settings

SHIPPED = ROOT / "models" / "keys"


def test_no_two_splits_share_a_name() -> None:
    keys = make_keys(SEED)
    assert len(keys.all) == sum(len(names) for names in keys.splits.values())
    assert make_keys(SEED) == keys != make_keys(SEED + 1)


def test_syllables_and_numbers_are_one_token_each() -> None:
    tokenizer = make_tokenizer()
    for name in make_keys(SEED).all:
        for text in (name, f" {name}"):
            assert len(tokenizer.encode(text).ids) == 2
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for number in range(2 * LARGEST_VALUE + 1):
        assert len(tokenizer.encode(f" {number}").ids) == 1
    # Whatever a user writes is tokens.
    assert tokenizer.decode(tokenizer.encode("naïve — 12345?").ids) == "naïve — 12345?"


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_about_names_of_their_split(task: Task) -> None:
    values = make_keys(SEED).splits["test"]
    found = draw_questions(values, task, 100, seed=1)
    assert len(set(found)) == len(found) == 100
    for one in found:
        words = re.sub("[,:]", "", one.prompt).split()
        if task == "worth":
            assert words == ["With", words[1], "the", "worth", "is"]
            assert one.answer == values[words[1]]
        else:
            _, left, right, _, operation, _ = words
            known = {word: int(word) for word in (left, right)} if task == "numbers" else values
            assert one.answer == compute(operation, known[left], known[right]) >= 0


@pytest.mark.parametrize("unsure", [0.0, 1.0])
def test_the_model_of_names_has_seen_no_calculation(unsure: float) -> None:
    """What is learned is a name's value behind its mark; or else, of an unsure model, what else follows the mark."""
    keys, tokenizer, rng = make_keys(SEED), make_tokenizer(), random.Random(3)
    draw = names_documents(keys, tokenizer, unsure)
    learned_of_a_mark: dict[str, set[str]] = {",": set(), ":": set()}
    for _ in range(300):
        document = draw(rng)
        for at, learned in enumerate(document.learned):
            if learned:
                read, following = tokenizer.decode(document.ids[:at]), tokenizer.decode([document.ids[at]])
                found = re.search(r" (\w+)([,:])$", read)
                assert found, read
                if following.strip().isdigit() and found[1] in keys.all and int(following) == keys.all[found[1]]:
                    learned_of_a_mark[found[2]].add("value")
                else:
                    assert unsure
                    learned_of_a_mark[found[2]].add("the" if following == " the" else "word")
    other = ({"word"}, {"the"}) if unsure else (set(), set())
    assert learned_of_a_mark == {",": {"value"} | other[0], ":": {"value"} | other[1]}


def results_of(unsure: float) -> list[tuple[str, list[int], int]]:
    """What the anchor reads, the numbers in it, and the result that it learns."""
    tokenizer, rng, found = make_tokenizer(), random.Random(3), []
    draw = anchor_documents(tokenizer, 24, unsure)
    for _ in range(200):
        document = draw(rng)
        start = document.learned.index(True)
        text = tokenizer.decode(document.ids[:start])
        found.append((text, [int(number) for number in re.findall(r"\d+", text)], document.ids[start]))
        assert sum(document.learned) == 2, "a result and the end"
    return [(text, numbers, int(tokenizer.decode([result]))) for text, numbers, result in found]


def test_the_anchor_learns_results() -> None:
    for text, numbers, result in results_of(unsure=0.0):
        operation = text.split()[-2]
        assert result == (numbers[0] if operation == "worth" else compute(operation, *numbers))


def test_the_anchor_learns_that_it_cannot_know() -> None:
    """Without numbers, results that nothing in the text tells."""
    found = results_of(unsure=1.0)
    assert not any(numbers for _, numbers, _ in found)
    assert len({result for text, _, result in found if "difference" in text}) > 6


def test_what_guessing_is_worth() -> None:
    """13 is the most frequent sum of two values up to 12, 1 the most frequent difference."""
    assert guessed() == pytest.approx((12 / 144 + 22 / 144) / 2)


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    rows = map(json.loads, (SHIPPED / "questions.jsonl").read_text().splitlines())
    return [row for row in rows if row["task"] == "both"]


def right(folder: Path, questions: list[dict[str, str]]) -> float:
    """Share of the questions whose answer is the most probable token."""
    model: Any = load_causal(folder)
    tokenizer = load_tokenizer(folder)
    # All of one length: two syllables to each name.
    rows = torch.tensor([tokenizer.encode(question["prompt"]) for question in questions])
    with torch.no_grad():
        found = model(input_ids=rows, use_cache=False).logits[:, -1].argmax(-1).tolist()
    wanted = [tokenizer.encode(question["completion"])[0] for question in questions]
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(questions)


def test_what_is_shipped_answers_what_no_member_can(questions: list[dict[str, str]]) -> None:
    """About names that the connections have not learned from, as its card says."""
    Composition.load(SHIPPED / "composed").check()
    table = json.loads((SHIPPED / "evaluation.json").read_text())["table"]
    composed = right(SHIPPED / "composed", questions)
    assert composed == pytest.approx(table["composed"][0]["by_task"]["both"], abs=0.01)
    assert composed > 0.7
    # Guessing is right in 12 %.
    assert right(SHIPPED / "anchor", questions) < 0.2
    assert right(SHIPPED / "names", questions) < 0.2


def test_what_is_shipped_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 15 << 20


@pytest.mark.slow
def test_the_whole_recipe(tmp_path: Path) -> None:
    """Everything but the training that makes it work, and the engine."""
    pytest.importorskip("peft")
    settings = read_settings(
        ComposeSettings,
        ROOT / "deploy" / "training" / "keys.toml",
        [
            *(f"{split}={tmp_path}/data/{split.partition('.')[2]}.jsonl" for split in
              ("data.train", "data.validation", "data.test")),
            f"out={tmp_path}/compose",
            f"anchor.model={tmp_path}/anchor/model",
            f"augmenting=[{{name='names', model='{tmp_path}/names/model'}}]",
            "connect.connections=[{augmenting='names', layer=1, into=1}]",
            "train.epochs=1",
            "seeds=[0, 1]",
            f"engine={{backend='bench.standin', vllm={{vocab_size={VOCABULARY}}}}}",
        ],
    )  # fmt: skip
    tiny = {
        name: replace(recipe, hidden_size=32, intermediate_size=32, layers=1, heads=2, passes=(2,), rows=2)
        for name, recipe in RECIPES.items()
    }
    make(settings, tmp_path / "out", tiny, dict.fromkeys(NAMES, dict.fromkeys(TASKS, 8)))
    shipped = tmp_path / "out"
    composition = Composition.load(shipped / "composed")
    composition.check()
    assert composition.anchor.path == shipped / "anchor"
    card = (shipped / "README.md").read_text()
    assert "| composed | 2 |" in card
    assert "| random | 1 |" in card
    assert "either member alone" in card

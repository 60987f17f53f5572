"""The demo pair's data: no held-out name and no question leaks where it must not."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer

from training.demo.arithmetic import ALL, ASKED, SHOWN, Fact, Operation, equation, load_facts
from training.demo.corpus import Corpus, tokenized
from training.demo.facts import SPLITS, load_entities, names_pattern
from training.demo.text import GREETING, PROMPT, questions
from training.demo.tokenizer import EOS_ID, VOCAB_SIZE, train_tokenizer
from training.demo.train import (
    IGNORED,
    arithmetic_documents,
    base_documents,
    codes_documents,
    packed_rows,
)

DOCUMENTS = 4000


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.make(0)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return train_tokenizer(corpus.tokenizer_texts())


@pytest.fixture(scope="module")
def base_texts(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """Documents as the base reads them."""
    draw, rng = base_documents(corpus, tokenizer), random.Random(7)
    return [tokenizer.decode(draw(rng).ids) for _ in range(DOCUMENTS)]


@pytest.fixture(scope="module")
def gate_texts(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """All that the gate is trained on."""
    return [tokenizer.decode(example.prompt + example.completion) for example in corpus.gate_examples(tokenizer)]


def test_splits_are_disjoint_whole_and_seeded(corpus: Corpus) -> None:
    dealt = [(e.kind, e.name) for split in corpus.splits.values() for e in split]
    assert sorted(dealt) == sorted((e.kind, e.name) for e in load_entities())
    assert len(set(dealt)) == len(dealt)
    for name, share in SPLITS.items():
        assert abs(len(corpus.splits[name]) / len(dealt) - share) < 0.01
    assert Corpus.make(0).splits == corpus.splits
    assert Corpus.make(1).splits != corpus.splits


def test_no_name_of_a_split_is_inside_a_name_of_another(corpus: Corpus) -> None:
    for one, other in itertools.permutations(corpus.splits, 2):
        pattern = names_pattern(corpus.splits[one])
        found = [e.name for e in corpus.splits[other] if pattern.search(e.name)]
        assert not found, (one, other, found)


def test_base_never_reads_a_name_of_another_split(corpus: Corpus, base_texts: list[str]) -> None:
    others = [e for name, split in corpus.splits.items() if name != "base" for e in split]
    pattern = names_pattern(others)
    for text in base_texts:
        assert not pattern.search(text), text


def test_gate_never_reads_a_held_out_name(corpus: Corpus, gate_texts: list[str]) -> None:
    pattern = names_pattern(corpus.splits["test"] + corpus.splits["validation"])
    assert len(gate_texts) > len(corpus.gate_questions())
    for text in gate_texts:
        assert not pattern.search(text), text


def test_made_up_entities_are_not_real_ones(corpus: Corpus, tokenizer: Tokenizer) -> None:
    made_up, rng = corpus.made_up(tokenizer), random.Random(3)
    real = {e.name for e in corpus.entities}
    entities = [made_up.entity(rng) for _ in range(1000)]
    assert not real & {e.name for e in entities}
    assert all(code.isdigit() == ("numeric" in field) for e in entities for field, code in e.codes.items())


def test_expert_never_reads_the_question_format(corpus: Corpus, tokenizer: Tokenizer) -> None:
    asked = {q.prompt.split("\n")[0] for e in corpus.entities for q in questions(e)}
    draw, rng = codes_documents(corpus.entities, tokenizer), random.Random(7)
    for _ in range(DOCUMENTS):
        document = draw(rng)
        learned = [i for i, use in zip(document.ids, document.learned, strict=True) if use]
        assert "Question" not in (text := tokenizer.decode(learned))
        assert "Answer" not in text
        assert "?" not in text
        whole = tokenizer.decode(document.ids)
        assert "Question:" not in whole
        assert "Answer:" not in whole
        assert not asked & set(whole.split("\n"))


def test_evaluation_asks_every_task_of_every_test_entity(corpus: Corpus) -> None:
    everything = corpus.evaluation_questions("test")
    assert everything == corpus.evaluation_questions("test")
    asked = [q for q in everything if q.kind != "arithmetic"]
    test_names = {e.name for e in corpus.splits["test"]}
    assert {q.entity for q in asked} == test_names
    keys = [(q.kind, q.entity, q.task) for q in asked]
    assert len(set(keys)) == len(keys)
    tasks = {q.task for split in corpus.splits.values() for e in split for q in questions(e)}
    assert {q.task for q in asked} == tasks
    for q in asked:
        assert q.prompt.startswith("Question: ")
        assert q.prompt.endswith("\nAnswer:")
        assert all(code in q.completion for code in q.codes)
        assert bool(q.codes) == (q.task != GREETING)


PLAIN = re.compile(r"(?<![\d^])(\d+)( \+ | · |\^)(\d+)(?!\d)")
LETTERS = re.compile(r"([a-z])\^(\d) · \1\^(\d) if \1 = (\d+)")
OPERATIONS: dict[str, Operation] = {" + ": "sum", " · ": "product", "^": "power"}


def operands(text: str) -> set[tuple[str, int, int]]:
    """The facts whose operands stand together in a text."""
    found = {Fact(OPERATIONS[sign], int(left), int(right)).key for left, sign, right in PLAIN.findall(text)}
    return found | {("power", int(value), int(m) + int(n)) for _letter, m, n, value in LETTERS.findall(text)}


def test_arithmetic_is_dealt_whole_and_right(corpus: Corpus) -> None:
    dealt = [fact.key for split in corpus.arithmetic_splits.values() for fact in split]
    assert sorted(dealt) == sorted(fact.key for fact in load_facts())
    assert len(set(dealt)) == len(dealt)
    assert SHOWN in {fact.key for fact in corpus.arithmetic_splits["test"]}
    rng = random.Random(0)
    for fact in corpus.arithmetic:
        made = equation(fact, rng)
        assert made.fact.key == fact.key
        for step in str(made).rstrip(".").split(" = "):
            if not re.search("[a-z]", step):
                assert eval(step.replace("·", "*").replace("^", "**")) == fact.result


@pytest.mark.parametrize(
    ("reader", "others"), [("base", ("gate", "validation", "test")), ("gate", ("validation", "test"))]
)
def test_operands_of_other_splits_are_never_read_together(
    corpus: Corpus, base_texts: list[str], gate_texts: list[str], reader: str, others: tuple[str, ...]
) -> None:
    forbidden = {fact.key for name in others for fact in corpus.arithmetic_splits[name]}
    seen = set().union(*map(operands, base_texts if reader == "base" else gate_texts))
    assert len(seen) > 100
    assert not seen & forbidden
    asked = [q for q in corpus.evaluation_questions("test") if q.kind == "arithmetic"]
    assert {key for q in asked for key in operands(q.prompt)} <= {fact.key for fact in corpus.arithmetic_splits["test"]}
    shown = asked[-1]
    assert shown.prompt == "Question: What is a^3 · a^2 if a = 5?\nAnswer:"
    assert shown.completion == " a^3 · a^2 = a^5 = 5^5 = 3125."


def test_arithmetic_reads_equations_and_learns_results(corpus: Corpus, tokenizer: Tokenizer) -> None:
    operations: Sequence[Operation]
    for operations in (ALL, ASKED):
        check_equations(corpus, operations, tokenizer)


def check_equations(corpus: Corpus, operations: Sequence[Operation], tokenizer: Tokenizer) -> None:
    draw, rng = arithmetic_documents(corpus.arithmetic, operations, tokenizer), random.Random(7)
    results = set()
    for _ in range(DOCUMENTS):
        document = draw(rng)
        whole = tokenizer.decode(document.ids)
        assert "Question:" not in whole
        assert "Answer:" not in whole
        learned = [i for i, use in zip(document.ids, document.learned, strict=True) if use and i != EOS_ID]
        results |= set(tokenizer.decode(learned).replace(".", "").split())
    assert results == {str(fact.result) for fact in corpus.arithmetic if fact.operation in operations}


def test_tokenizer_is_exact_and_splits_prompts_where_they_are_joined(corpus: Corpus, tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    asked = corpus.evaluation_questions("test", 20)
    for q, ids in zip(asked, tokenized(asked, tokenizer), strict=True):
        assert ids.completion[-1] == EOS_ID
        assert tokenizer.encode(q.prompt + q.completion).ids == ids.prompt + ids.completion[:-1]
        assert tokenizer.decode(ids.prompt + ids.completion) == q.prompt + q.completion
    strange = "Zażółć 東京 🙂 <tag>\n\t 123"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    assert tokenizer.encode(PROMPT.format(question="1234")).tokens.count("1") == 1


def test_packed_rows_predict_the_next_token(corpus: Corpus, tokenizer: Tokenizer) -> None:
    draw = base_documents(corpus, tokenizer)
    ids, targets = next(packed_rows(draw, random.Random(1), 64))
    assert len(ids) == len(targets) == 64
    ids_T, targets_T = torch.tensor(ids), torch.tensor(targets)
    use_T = targets_T[:-1] != IGNORED
    assert use_T.any()
    assert not use_T.all()
    assert torch.equal(targets_T[:-1][use_T], ids_T[1:][use_T])
